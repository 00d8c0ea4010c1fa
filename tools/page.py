"""A page that shows what thinking changed at every token: one file, no script, no request.

    python sample.py --checkpoint=out/quiet --prompt="ball c : ab cd ce now" --html=page.html
    python sample.py --checkpoint=out/quiet --text-file=a.txt --html=page.html    # teacher forcing

Each token is tinted by its gain and carries a card with its thought, the mixing weight, and the
likeliest tokens without and with the thought. CSS alone shows a token's card when it is hovered,
focused by Tab or a tap, or chosen in the chart, so the page works wherever HTML does; its content
security policy forbids scripts and requests, whatever the text says.

Left out on purpose: scripts, and a library for one bar chart.

Read next: gate.py
"""
import html
import math
import re
from collections.abc import Iterator

from tools.trace import Token

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f23; --faint: #667079; --paper: #fff;
  --raised: #f5f6f7; --line: #d5d9dd; --helped: 10 150 90; --hurt: 235 120 10; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --faint: #98a2ab; --paper: #15181b;
  --raised: #1f2428; --line: #3a4147; --helped: 30 150 95; --hurt: 195 95 10; } }
* { box-sizing: border-box; } html { scroll-padding: 2rem 0 23rem; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem 1.2rem 23rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: .4rem 0; } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p { margin: .4rem 0; max-width: 46rem; } .faint, dt, .axis { color: var(--faint); }
.scale { display: inline-block; width: 12rem; max-width: 40vw; height: .8em; margin: 0 .4em;
  border: 1px solid var(--line); background: linear-gradient(to right,
  rgb(var(--hurt) / .7), transparent, rgb(var(--helped) / .7)); }
figure { margin: .8rem 0; display: grid; grid-template-columns: auto 1fr; column-gap: .5rem; }
svg { width: 100%; height: 6.5rem; border: solid var(--line); border-width: 1px 0; }
.axis { display: flex; flex-direction: column; justify-content: space-between; font-size: .75rem;
  text-align: right; } figcaption { font-size: .8rem; grid-column: 2; }
rect { fill: rgb(var(--helped)); } .hurt rect { fill: rgb(var(--hurt)); }
a:hover rect { fill: var(--ink); } rect.reach { fill: transparent; }
line { stroke: var(--faint); vector-effect: non-scaling-stroke; pointer-events: none; }
.text { font-size: 1.1rem; line-height: 2; overflow-wrap: anywhere; white-space: pre-wrap; }
.seen { --tint: var(--helped); background: rgb(var(--tint) / var(--strength)); cursor: pointer;
  border-radius: .2rem; }
.seen.hurt { --tint: var(--hurt); } .given { color: var(--faint); }
.seen:hover, .seen:focus-within, .seen:target { outline: 2px solid var(--ink);
  outline-offset: 1px; }
.newline::before { content: "\\21b5"; color: var(--faint); }
.part::before { content: "\\25e6"; color: var(--faint); }
.card { display: none; white-space: normal; }
.card, .hint { position: fixed; z-index: 1; left: 0; right: 0; bottom: 0; height: 21rem;
  overflow: auto; padding: .8rem 1.2rem; background: var(--raised); color: var(--ink);
  border-top: 1px solid var(--line); font-size: .9rem; line-height: 1.45; }
.hint { z-index: 0; color: var(--faint); }
.seen:target > .card { display: block; } .seen:focus-within > .card { display: block; z-index: 2; }
.seen:hover > .card { display: block; z-index: 3; }
.thought { display: block; font-family: ui-monospace, monospace; overflow-wrap: anywhere;
  white-space: pre-wrap; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .8rem; margin: .5rem 0; }
dd { margin: 0; } .pair { display: grid; gap: 1rem;
  grid-template-columns: repeat(2, minmax(0, 1fr)); }
ol { list-style: none; margin: .2rem 0; padding: 0; } .pair li { display: flex; gap: .5rem;
  padding: 0 .3rem; background: linear-gradient(to right, var(--line) calc(100% * var(--p)),
  transparent 0); margin-bottom: 1px; }
li span:first-child { flex: 1; overflow: hidden; white-space: pre; text-overflow: ellipsis; }
.true { font-weight: bold; }
@media (min-width: 58rem) { html { scroll-padding: 2rem 0; }
  body { padding-right: 26rem; padding-bottom: 3rem; }
  .card, .hint { left: auto; right: max(1.2rem, (100vw - 76rem) / 2); top: 1.2rem; bottom: auto;
  width: 23rem; height: min(28rem, 100vh - 2.4rem); border: 1px solid var(--line);
  border-radius: .4rem; } }
"""
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
<p>hurt<span class="scale"></span>helped</p>
<p class="faint">Each token is tinted by what its thought did to its likelihood. Hover or tap one,
or walk with Tab, to see that thought. A thought is what raised the likelihood of text, not a record
of why the model says what it says; nothing makes it faithful, nor harmless.</p>
<main><div class="hint">Choose a token to see its thought.</div>
"""


def page(texts: list[list[Token]], name: str) -> str:
    """The whole page, about each of the texts in turn; `name` is the model's."""
    most = max([abs(token.gain) for tokens in texts for token in tokens] + [0.1])       # nats
    sections = (section(tokens, number, len(texts), most) for number, tokens in enumerate(texts))
    head = HEAD.format(title=literal(f"What thinking changed: {name}"), style=STYLE)
    return f"{head}{''.join(sections)}</main></body></html>\n"


def literal(text: str) -> str:
    """As HTML that shows just this text; control characters but white space as Python's escapes."""
    shown = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", lambda found: repr(found[0])[1:-1], text)
    return html.escape(shown).replace("\r", "&#13;")


def section(tokens: list[Token], number: int, n_texts: int, most: float) -> str:
    seen = [token for token in tokens if token.logp is not None]
    count = max(1, len(seen))
    gain, nll = sum(t.gain for t in seen) / count, -sum(t.logp for t in seen) / count
    facts = (f"{len(seen)} tokens, {sum(t.thinks for t in seen)} thought about; {nll + gain:.3f} "
             f"nats a token without thoughts, {nll:.3f} with")
    heading = f"<h2>{number + 1} of {n_texts}</h2>" if n_texts > 1 else ""
    words = "".join(word(token, f"t{number}-{token.place}") for token in tokens)
    return (f'<section>{heading}<p class="faint">{facts}</p>{chart(seen, number, most)}'
            f'<div class="text">{words}</div></section>\n')


def chart(seen: list[Token], number: int, most: float) -> str:
    """Gain by token, from -most to +most nats; a bar leads to its token."""
    bars = []
    for x, token in enumerate(seen):
        height = abs(token.gain) / most
        top = 1 - height if token.gain > 0 else 1
        side = ' class="hurt"' if token.gain < 0 else ""
        bars.append(f'<a href="#t{number}-{token.place}" tabindex="-1"{side}>'
                    f'<rect class="reach" x="{x}" y="0" width="1" height="2"/>'
                    f'<rect x="{x + .1:.1f}" y="{top:.4f}" width=".8" height="{height:.4f}"/></a>')
    axis = f'<span>{most:+.2f}</span><span>0</span><span>{-most:+.2f}</span>'
    return (f'<figure><div class="axis">{axis}</div>'
            f'<svg viewBox="0 0 {max(1, len(seen))} 2" style="max-width:{3 * len(seen)}rem" '
            f'preserveAspectRatio="none" role="img" aria-label="gain by token">{"".join(bars)}'
            f'<line x1="0" x2="{len(seen)}" y1="1" y2="1"/></svg>'
            '<figcaption class="faint">nats gained by thinking, by token</figcaption></figure>')


def word(token: Token, name: str) -> str:
    """A token, which can be focused if it was predicted, and its card."""
    text = token.text if token.text.isspace() else token.text.lstrip(" ")
    space = " " * (len(token.text) - len(text))                         # stays untinted
    if token.logp is None:
        return f'{space}<span class="given">{literal(text)}</span>' if token.text else ""
    kind = "newline" if text.startswith("\n") else "" if text else "part"
    strength = 0.7 * (1 - math.exp(-abs(token.gain)))
    side = " hurt" if token.gain < 0 else ""
    return (f'{space}<span class="seen{side}" id="{name}" tabindex="0" '
            f'aria-describedby="{name}-card" style="--strength:{strength:.3f}">'
            f'<span class="{kind}">{literal(text)}</span>{card(token, name)}</span>')


def card(token: Token, name: str) -> str:
    without, after = math.exp(token.logp - token.gain), math.exp(token.logp)
    facts = {"mixing weight": f"{token.mixing_weight:.2f}", "gain": f"{token.gain:+.3f} nats",
             "probability": f"{without:.3f} → {after:.3f}"} if token.thinks else {
             "probability": f"{after:.3f}"}
    facts["entropy without"] = f"{token.entropy:.2f} nats"
    if token.reward is not None:
        facts["reward ahead"] = f"{token.reward:+.3f} nats"
    rows = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in facts.items())
    lists = {"without the thought": token.base, "with it": token.mixed} if token.thinks else {
             "likeliest": token.base}
    thought = literal(token.thought) if token.thinks else "no thought here"
    pair = "".join(f"<div>{head}<ol>{''.join(choices(best, token.id))}</ol></div>"
                   for head, best in lists.items())
    return (f'<span class="card" id="{name}-card"><span class="faint">thought before</span> '
            f'<b>{literal(token.text.strip()) or "◦"}</b><span class="thought">{thought}</span>'
            f'<dl>{rows}</dl><div class="pair">{pair}</div></span>')


def choices(best: tuple, true_id: int) -> Iterator[str]:
    for i, text, p in best:
        shown = literal(text.replace("\n", "↵")) or f"&lt;{i}&gt;"
        yield (f'<li style="--p:{p:.3f}"{" class=true" if i == true_id else ""}>'
               f"<span>{shown}</span><span>{100 * p:.1f} %</span></li>")
