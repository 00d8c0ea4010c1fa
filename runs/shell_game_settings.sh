# Settings of the shell game, read by demo.sh and shell_game.sh. Chance is one cup in five.
model="--dim=128 --n_layers=2 --n_heads=4 --n_kv_heads=2 --ffn_dim=352 --max_seq_len=512"
pretrain="--objective=plain --steps=1200 --batch_size=32 --seq_len=64 --crops=stream
  --lr=2e-3 --min_lr=1e-4 --warmup=50 --weight_decay=0 --eval_every=300 --eval_texts=500 --save_every=300"
tune="--batch_size=56 --seq_len=12 --crops=document --lr=3e-4 --min_lr=1.5e-5 --warmup=20 --weight_decay=0
  --eval_every=25 --eval_texts=500 --save_every=50"
plain="--objective=plain $tune --steps=200"
quiet="$tune --thought_len=6 --n_true=1 --n_thoughts=4 --policy_weight=10 --policy_temperature=1
  --marker_lr=1 --mixing_lr=5 --steps=200"
