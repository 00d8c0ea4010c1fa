"""The log of a training run: log.jsonl with a row a step, and a line on the screen."""
import json
import time

import config
from config import UserError

COLUMNS = {                           # how the screen shows a name of the log
    "loss": ("loss", ".4f"), "nll/base": ("base", ".4f"), "nll/mixed": ("mixed", ".4f"),
    "thought/reward": ("reward", "+.4f"), "thought/entropy": ("entropy", ".3f"),
    "thought/mixing_weight": ("weight", "+.3f"),
    "grad_norm": ("norm", ".2f"), "lr": ("lr", ".1e"), "tokens/s": ("tok/s", ".0f")}


class RunLog:
    """log.jsonl, a row a step under stable names; the same on the screen about once a second."""
    @config.file_errors()
    def __init__(self, out, step, is_main):
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.is_main, self.printed = out / "log.jsonl", is_main, 0.0
        self.began, self.first = time.monotonic(), step
        self.damaged = ""             # begins the next row, if the last was not written whole
        if is_main:
            config.lock_folder(out, self)
            if step == 0:                         # a log of a run whose checkpoints are gone
                config.move_aside(self.path)
            for path in (self.path, out / "latest"):
                if not path.is_file():            # but a folder or a pipe
                    config.move_aside(path)
        if is_main and self.path.is_file():
            # a resumed run drops what its checkpoint does not hold; a row of a step says step + 1
            lines = config.read_text(self.path).splitlines()
            try:
                rows = [config.parse_json(line, {"step": int}, self.path)
                        for line in lines if line.endswith("}")]
            except UserError:
                raise UserError(f"{self.path} is damaged: give it another name") from None
            kept = [row for row in rows if row["step"] < step + ("loss" in row)]
            with config.atomic_write(self.path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def row(self, step, steps, values, always=False):
        if not self.is_main:
            return
        try:
            with open(self.path, "a") as file:
                file.write(self.damaged + json.dumps({"step": step, **values}) + "\n")
            self.damaged = ""
        except OSError as error:      # a log never costs the run
            self.damaged = "\n"
            config.say(f"cannot write {self.path}: {error.strerror}; the run goes on")
        if always or time.monotonic() > self.printed + 1:
            self.printed = time.monotonic()
            shown = [f"step {step}/{steps}"]
            for name, value in values.items():
                if name in COLUMNS or name.startswith("eval/"):
                    head, form = COLUMNS.get(name, (name, ".4f"))
                    shown.append(f"{head} {value:{form}}")
            if step > self.first:
                seconds_a_step = (time.monotonic() - self.began) / (step - self.first)
                shown.append(f"{seconds_a_step * (steps - step):.0f} s left")
            config.say("  ".join(shown))
