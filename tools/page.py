"""A page that shows how thinking changed every token: one file, no script, no request.

    python sample.py --checkpoint=out/quiet --prompt="ball c : ab cd ce now" --html=page.html

Each token is tinted by its gain and has a card with its thought and predictions, which page.css
alone shows when the token is hovered, focused or chosen in the chart. The page forbids scripts and
requests, whatever the text says. Left out on purpose: a library for one bar chart.
"""
import html
import math
from pathlib import Path

from config import printable
from tools.show import Token


def page(texts: list[list[Token]], name: str) -> str:
    """Return the whole page with each of the texts in turn; `name` is the model's."""
    strongest = max([abs(token.gain) for tokens in texts for token in tokens] + [0.1])     # nats
    sections = ""
    for number, tokens in enumerate(texts):
        predicted = [token for token in tokens if token.logp is not None]
        count = max(1, len(predicted))
        nll = -sum(token.logp for token in predicted) / count
        gain = sum(token.gain for token in predicted) / count
        n_thoughts = sum(token.thinks for token in predicted)
        heading = f"<h2>{number + 1} of {len(texts)}</h2>" if len(texts) > 1 else ""
        words = "".join(_word(token, f"t{number}-{i}") for i, token in enumerate(tokens))
        sections += (f'<section>{heading}<p class="faint">{len(predicted)} tokens, {n_thoughts} '
                     f"thought about; {nll + gain:.3f} nats a token without thoughts, {nll:.3f} "
                     f"with</p>{_chart(tokens, number, strongest)}"
                     f'<div class="text">{words}</div></section>\n')
    folder, title = Path(__file__).parent, _escaped(f"What thinking changed: {name}")
    style, template = ((folder / f"page.{kind}").read_text("utf-8") for kind in ("css", "html"))
    return template.format(title=title, style=style, sections=sections)


def _escaped(text: str) -> str:
    """Return HTML that shows exactly this text; control characters but white space as escapes."""
    return html.escape(printable(text, keep="\n\r\t")).replace("\r", "&#13;")


def _chart(tokens: list[Token], number: int, strongest: float) -> str:
    """Draw the gain of each predicted token, at most `strongest` nats; a bar leads to its token."""
    bars, first, n = "", sum(token.logp is None for token in tokens), len(tokens)
    for x, token in enumerate(tokens[first:], first):
        height = abs(token.gain) / strongest
        top = 1 - height if token.gain > 0 else 1
        side = ' class="hurt"' if token.gain < 0 else ""
        bars += (f'<a href="#t{number}-{x}" tabindex="-1"{side}>'
                 f'<rect class="reach" x="{x}" y="0" width="1" height="2"/>'
                 f'<rect x="{x + .1:.1f}" y="{top:.4f}" width=".8" height="{height:.4f}"/></a>')
    return (f'<figure><div class="axis"><span>{strongest:+.2f}</span><span>0</span>'
            f"<span>{-strongest:+.2f}</span></div>"
            f'<svg viewBox="{first} 0 {max(1, n - first)} 2" preserveAspectRatio="none" role="img" '
            f'style="max-width:{3 * (n - first)}rem" aria-label="gain by token">{bars}<line y1="1" '
            f'y2="1" x1="{first}" x2="{n}"/></svg><figcaption class="faint">nats gained by '
            'thinking, by token</figcaption></figure>')


def _word(token: Token, name: str) -> str:
    """Return a token, which can be focused if it was predicted, and its card."""
    text = token.text if token.text.isspace() else token.text.lstrip(" ")
    space = " " * (len(token.text) - len(text))                         # stays untinted
    if token.logp is None:
        return f'{space}<span class="given">{_escaped(text)}</span>' if token.text else ""
    kind = "newline" if text.startswith("\n") else "" if text else "part"
    strength = 0.7 * (1 - math.exp(-abs(token.gain)))
    side = " hurt" if token.gain < 0 else ""
    return (f'{space}<span class="seen{side}" id="{name}" tabindex="0" '
            f'aria-describedby="{name}-card" style="--strength:{strength:.3f}">'
            f'<span class="{kind}">{_escaped(text)}</span>{_card(token, name)}</span>')


def _card(token: Token, name: str) -> str:
    after, thought = math.exp(token.logp), "no thought here"
    facts = {"probability": f"{after:.3f}"}
    lists = {"likeliest": token.base}
    if token.thinks:
        before, thought = math.exp(token.logp - token.gain), _escaped(token.thought)
        facts = {"mixing weight": f"{token.mixing_weight:.2f}", "gain": f"{token.gain:+.3f} nats",
                 "probability": f"{before:.3f} → {after:.3f}"}
        lists = {"without the thought": token.base, "with it": token.mixed}
    facts["entropy without"] = f"{token.entropy:.2f} nats"
    if token.reward is not None:
        facts["reward ahead"] = f"{token.reward:+.3f} nats"
    rows = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in facts.items())
    pair = ""
    for head, likeliest in lists.items():
        pair += f"<div>{head}<ol>"
        for i, text, p in likeliest:
            shown = _escaped(text.replace("\n", "↵")) or f"&lt;{i}&gt;"
            true = " class=true" if i == token.id else ""
            pair += f'<li style="--p:{p:.3f}"{true}><span>{shown}</span><span>{p:.1%}</span></li>'
        pair += "</ol></div>"
    return (f'<span class="card" id="{name}-card"><span class="faint">thought before</span> '
            f'<b>{_escaped(token.text.strip()) or "◦"}</b><span class="thought">{thought}</span>'
            f'<dl>{rows}</dl><div class="pair">{pair}</div></span>')
