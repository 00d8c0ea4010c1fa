"""Run any task of the lm-evaluation-harness on a model that thinks, or on one that does not.

    pip install lm-eval==0.4.13
    python -m tasks.lm_eval_harness run --model quiet_star --model_args checkpoint=out/quiet \\
        --tasks gsm8k_cot_zeroshot [--include_path=FOLDER]

All options are those of the harness; --model_args are checkpoint and thoughts (own, shuffled,
none). A likelihood is that of eval.py: only the scored positions think. docs/RESULTS.md shows how
to read the questions of a task from a file instead of a download.
Left out on purpose: chat templates, top_p and top_k, several processes, --batch_size=auto.
"""
import math
import sys
from collections import defaultdict
from importlib.util import find_spec

if not find_spec("lm_eval"):
    raise SystemExit("error: the harness is missing: pip install lm-eval==0.4.13")

from lm_eval import utils
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from checkpoint import find_checkpoint, load_for_inference
from config import Progress, UserError, check_json, run
from inference import complete, cut_at
from scoring import answer_logits, thinks
from thoughts import base_model
from tokenizer import load_tokenizer

OPTIONS = {"until": (None, str, [str]), "do_sample": (None, bool), "temperature": float}


@register_model("quiet_star")
class QuietStarLM(TemplateLM):
    """The interface that the harness calls, on top of scoring.py and inference.py."""
    def __init__(self, checkpoint="", thoughts="own", device="auto", batch_size=16):
        super().__init__()
        if thoughts not in ("own", "shuffled", "none"):
            raise UserError(f"thoughts={thoughts} is not one of own, shuffled, none")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size} is not a whole number of 1 or more")
        self.thoughts = thoughts
        self.batch_size = int(batch_size)
        self.text_tokenizer = load_tokenizer(find_checkpoint(checkpoint))
        device = "cpu" if device == "cpu" else "auto"    # the harness's default is cuda
        self.quiet = load_for_inference(checkpoint, device, self.text_tokenizer)
        self.max_length = base_model(self.quiet).config.max_seq_len
        if thinks(self.quiet, thoughts):
            # A thought and its two markers take room behind the visible text.
            self.max_length -= self.quiet.config.thought_len + 2

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """Id that stands before a text which has nothing before it."""
        bos = self.text_tokenizer.bos
        if bos is None and self.eot_token_id is None:
            raise UserError("a text is empty, and the tokenizer has no bos or eos to begin it with")
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens=None, **_) -> list[int]:
        return self.text_tokenizer.encode(string, bos=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """Return log p of each continuation, and whether all its tokens are the likeliest ones, for
        requests (anything, context ids, continuation ids). Long contexts lose their beginning."""
        # Requests that differ in their last token only are predicted once.
        requests_of = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) >= self.max_length:
                raise UserError(f"an answer of {len(continuation)} tokens does not fit into a "
                                f"context of {self.max_length}")
            ids = (*context, *continuation)[-self.max_length:]
            key = ids[:-1], len(ids) - len(continuation)
            requests_of[key].append(i)
        answers = [None] * len(requests)
        keys = sorted(requests_of, key=lambda key: -len(key[0]))
        for batch in self._batches(keys, "loglikelihood"):
            texts = [([*ids, 0], start) for ids, start in batch]
            logits = answer_logits(self.quiet, texts, self.thoughts)
            for key, (_, mixed_SV, _) in zip(batch, logits):
                logp_SV = mixed_SV.log_softmax(-1)
                for i in requests_of[key]:
                    target_S = logp_SV.new_tensor(requests[i][2]).long()
                    logp_S1 = logp_SV.gather(1, target_S[:, None])
                    is_greedy = (logp_SV.argmax(-1) == target_S).all()
                    answers[i] = float(logp_S1.sum()), bool(is_greedy)
        if not all(math.isfinite(logp) for logp, _ in answers):
            raise UserError("a log-likelihood is nan or infinite: the weights are damaged, or "
                            "overflow in this type, or the text holds the marker of a thought")
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """Return log p of whole texts. Long ones are cut into windows: each token counts once."""
        sums = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = utils.get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length - 1, context_len=1)
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            sums.append(sum(logp for logp, _ in self._loglikelihood_tokens(parts)))
        return sums

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """Continue each text up to the first of its stop strings, which is left out."""
        if self.thoughts == "shuffled":
            raise UserError("thoughts=shuffled: text that is being generated has none to shuffle")
        prompts = [self.tok_encode(r.args[0]) or [self.prefix_token_id] for r in requests]
        requests_of = defaultdict(list)
        rooms = []                                # of answers that are cut
        for i, request in enumerate(requests):
            stops, temperature, most = self._options(request.args[1])
            room = self.max_length - len(prompts[i])
            if room < 1:
                raise UserError(f"a prompt of {len(prompts[i])} tokens leaves no room for an "
                                f"answer in a context of {self.max_length}")
            requests_of[stops, temperature, min(most, room)].append(i)
            if room < most:
                rooms.append(room)
        if rooms:
            print(f"max_gen_toks is cut to the room that {len(rooms)} long prompts leave, "
                  f"{min(rooms)} tokens or more", file=sys.stderr)
        texts = [""] * len(requests)
        for (stops, temperature, max_new_tokens), numbers in requests_of.items():
            numbers.sort(key=lambda i: -len(prompts[i]))
            for batch in self._batches(numbers, "generate_until"):
                said = complete(
                    self.quiet, [prompts[i] for i in batch], self.text_tokenizer, max_new_tokens,
                    stop=lambda row, text: cut_at(text, stops)[1],
                    think=self.thoughts == "own", temperature=temperature,
                    keys=[(0, i) for i in batch])      # the place in the list, in any batch
                for i, text in zip(batch, said):
                    texts[i], _ = cut_at(text, stops)
        return texts

    def _batches(self, items, what):
        progress = Progress(len(items), what)
        for i in range(0, len(items), self.batch_size):
            batch = items[i:i + self.batch_size]
            yield batch
            progress(len(batch))

    def _options(self, options):
        """Return stop strings, temperature (0 takes the likeliest token) and tokens at most."""
        check_json({"temperature": 0} | options, OPTIONS, "generation_kwargs of the task")
        temperature = options.get("temperature", 0)
        if temperature and not 0.01 <= temperature <= 100:
            raise UserError(f"temperature={temperature} is neither 0 nor from 0.01 to 100")
        options = normalize_gen_kwargs(options)
        stops = tuple(filter(None, options.pop("until")))     # every text would end with ""
        default = options.pop("do_sample")             # True is temperature 1
        temperature = float(options.pop("temperature", default))
        max_new_tokens = options.pop("max_gen_toks")
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise UserError(f"max_gen_toks={max_new_tokens!r} is no whole number above 0")
        for name, value in options.items():
            if value not in (None, 0, 1.0):
                raise UserError(f"generation option '{name}': {value} is not supported")
        return stops, temperature, max_new_tokens


if __name__ == "__main__":
    run(cli_evaluate)
