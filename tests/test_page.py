"""The page, in a real browser: what a person sees, hovers, tabs through and taps."""
import math
import os
import re

import pytest

import browser
import sample
from checkpoint import save_model
from config import printable
from tokenizer import Tokenizer, load_tokenizer
from tools.show import START_THOUGHT
from tools import page
from tools.gate import Gate
from tools.show import Token
from toys import tiny_quiet

PIECES = ["<b>bold", "</b>", " &", " &amp;", ' "quoted"', " 'x'", " ", b"\xf0\x9f", b"\x8e\xb2",
          " é", f" {START_THOUGHT}", " </script>", "</span></style>\n", " -->", " ]]>\t",
          "  <img src='http://no.invalid/a'", """ onerror="document.title='run'">""", "<!-- end. "]
PIECES = [piece if isinstance(piece, bytes) else piece.encode() for piece in PIECES]
TEXT = b"".join(PIECES * 9).decode()
WIDE, NARROW = (1200, 800), (390, 844)
SHOWN = """(() => { const r = document.querySelector('.hint').getBoundingClientRect();
             const top = document.elementFromPoint(r.left + 40, r.top + 20);
             return top.closest('.card, .hint').id })()"""        # what lies where cards appear
PLAIN = """[...document.querySelectorAll('.text')].map(text => { const copy = text.cloneNode(true);
             copy.querySelectorAll('.card').forEach(card => card.remove());
             return copy.textContent })"""


@pytest.fixture(scope="module")
def chromium():
    program = browser.find()
    if program is None:
        reason = f"no browser ({', '.join(browser.NAMES)}): apt-get install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with browser.Browser(program) as found:
        yield found


@pytest.fixture(scope="module")
def tokens():
    quiet = tiny_quiet(model=dict(vocab_size=len(PIECES)))
    ids = [*range(len(PIECES))] * 9
    stream = sample.teacher_forced(quiet, Tokenizer(PIECES, None, None), ids, gate=Gate(2.2))
    return stream.prompt + stream.tokens


@pytest.fixture(scope="module")
def url(tokens, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page.page([tokens], "<toy> & 'sons'"), "utf-8")
    return path.as_uri()


def test_text_is_shown_literally_every_token_once_and_nothing_is_requested(chromium, url, tokens):
    chromium.open(url)
    assert chromium.run(PLAIN) == [TEXT]
    assert chromium.run("document.querySelector('.text').innerText") == TEXT    # spaces are seen
    assert chromium.run("document.querySelectorAll('.text b').length") == chromium.run(
        "document.querySelectorAll('.card > b').length")
    assert chromium.run("document.querySelectorAll('.seen, .given').length") == len(tokens)
    assert chromium.run("document.title") == "What thinking changed: <toy> & 'sons'"
    assert chromium.run("document.querySelectorAll('script, img, link, iframe').length") == 0
    chromium.hover("#t0-5")
    assert chromium.requests == [url]


def test_no_policy_no_script_and_no_address_could_make_a_request(tokens):
    content = page.page([tokens], "toy")
    assert "default-src 'none'" in content and "<script" not in content
    assert not re.search(r"<\w[^>]*\s(src|srcset|data|action)=|href=\"[^#]|url\(|@import", content)


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_hover_and_keyboard_focus_reveal_the_thought(chromium, url, tokens, size):
    chromium.open(url, *size)
    thinkers = [t for t in tokens if t.thinks]
    assert 0 < len(thinkers) < len(tokens) - 1 and chromium.run(SHOWN) == ""
    for token in (thinkers[0], thinkers[3], next(t for t in tokens[1:] if not t.thinks)):
        name = f"t0-{[t is token for t in tokens].index(True)}"
        chromium.hover(f"#{name}")
        assert chromium.run(SHOWN) == f"{name}-card"
        card = chromium.run(f"document.getElementById('{name}-card').innerText")
        wanted = (["no thought here"] if not token.thinks else
                  [f"{token.mixing_weight:.2f}", f"{token.gain:+.3f} nats", f"{token.reward:+.3f}",
                   "without the thought"])
        assert all(words in card for words in wanted)
        thought = chromium.run(f"document.querySelector('#{name}-card .thought').textContent")
        assert thought == printable(token.thought, keep="\n\r\t") or not token.thinks
        best = chromium.run(f"document.querySelectorAll('#{name}-card li').length")
        assert best == (10 if token.thinks else 5)
    chromium.hover("h1")
    assert chromium.run(SHOWN) == ""
    for place in (1, 2, 3):
        chromium.press_tab()
        if chromium.run("document.activeElement.className") == "card":          # it is long: scroll
            chromium.press_tab()
        assert chromium.run("document.activeElement.id") == f"t0-{place}"
        assert chromium.run(SHOWN) == f"t0-{place}-card"
    chromium.hover("#t0-9")                                # what is hovered comes before the focus
    assert chromium.run(SHOWN) == "t0-9-card"


def test_a_bar_of_the_chart_leads_to_its_token(chromium, url, tokens):
    chromium.open(url)
    assert chromium.run("document.querySelectorAll('svg a').length") == len(tokens) - 1
    chromium.click("svg a:nth-of-type(20)")
    chromium.hover("h1")
    assert chromium.run(SHOWN) == "t0-20-card"
    heights = chromium.run("[...document.querySelectorAll('svg a rect + rect')].map("
                           "bar => +bar.getAttribute('height'))")
    most = max(abs(t.gain) for t in tokens)
    assert heights == pytest.approx([abs(t.gain) / most for t in tokens[1:]], abs=1e-4)


def contrast(one, other) -> float:
    """WCAG's ratio of two opaque sRGB colours; 4.5 is its least for text."""
    def light(colour):
        linear = [c / 3294.6 if c < 10.3 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def colour(chromium, selector: str, name: str) -> list[float]:
    """Red, green, blue, and alpha if it is not 1."""
    text = chromium.run(f"getComputedStyle(document.querySelector('{selector}')).{name}")
    return [float(part) for part in text[text.index("(") + 1:-1].replace(" /", ",").split(",")]


def rectangle(chromium, name: str) -> list[float]:
    return chromium.run(f"(() => {{ const r = document.getElementById('{name}')."
                        "getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] })()")


def apart_of_card(chromium, name: str) -> bool:
    """Is a token on the screen, beside or above its card?"""
    word, card = rectangle(chromium, name), rectangle(chromium, f"{name}-card")
    return 0 <= word[1] < word[3] <= chromium.run("innerHeight") and (
        word[2] <= card[0] or word[3] <= card[1])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_is_readable_in_light_and_dark_wide_and_narrow(chromium, tmp_path, size, dark):
    """Contrast of text on the strongest tints, no sideways scrolling, no card off the screen or
    over the token it belongs to."""
    path = tmp_path / "strong.html"
    best = ((1, "<w>", 0.7), (2, "a rather long token" * 4, 0.2))
    path.write_text(page.page([[
        Token(1, f" word{n}", True, "so\n" * 40, 0.5, (-9.0, 9.0, 0.0)[n % 3], -10.0,
              1.0, 0.1, best, best) for n in range(200)]], "toy"), "utf-8")
    chromium.open(path.as_uri(), *size, dark)
    ink, paper = (colour(chromium, "body", name) for name in ("color", "backgroundColor"))
    assert (sum(paper) < 3 * 64) == dark
    faint = colour(chromium, "p.faint", "color")
    assert contrast(ink, paper) > 7 and contrast(faint, paper) > 4.5
    assert contrast(faint, colour(chromium, ".hint", "backgroundColor")) > 4.5
    tints = [colour(chromium, f"#t0-{n}", "backgroundColor") for n in (0, 1)]
    for *tint, alpha in tints:
        blend = [alpha * t + (1 - alpha) * p for t, p in zip(tint, paper)]
        assert alpha == pytest.approx(0.7, abs=1e-3) and contrast(ink, blend) > 4.5
    (orange, green), red_green = tints, lambda c: c[0] > c[1]
    assert red_green(orange) and not red_green(green)
    assert chromium.run("document.documentElement.scrollWidth") <= size[0]
    chromium.run("document.getElementById('t0-199').focus()")
    assert apart_of_card(chromium, "t0-199")
    card = rectangle(chromium, "t0-199-card")
    assert 0 <= card[0] and 0 <= card[1] and card[2] <= size[0] and card[3] <= size[1]
    covered = """[...document.querySelectorAll('.seen')].find(
        word => word.getBoundingClientRect().top > innerHeight - 120)"""       # by a narrow card
    chromium.run("scrollTo(0, 0)")
    chromium.run(f"window.found = {covered}; found.focus()")
    assert apart_of_card(chromium, chromium.run("found.id"))
    chromium.run("document.getElementById('t0-199').focus()")
    chromium.press_tab()                                   # into the card, which is long, to scroll
    chromium.hover("h1")
    assert chromium.run(SHOWN) == "t0-199-card"


def test_the_page_of_a_prompt_holds_every_sample(chromium, call, game, tmp_path):
    save_model(tiny_quiet(model=dict(vocab_size=20, max_seq_len=64)), tmp_path / "model",
               tokenizer=load_tokenizer(game))
    argv = (f"--checkpoint={tmp_path}/model", "--prompt=ball c : ab", "--max_new_tokens=8",
            "--temperature=1", "--samples=3")
    status, text, _ = call(sample, *argv, f"--html={tmp_path}/page.html")
    chromium.open((tmp_path / "page.html").as_uri())
    assert status == 0 and chromium.run(PLAIN) == text.splitlines()[1::2]
    grey = chromium.run("[...document.querySelectorAll('.text')].map(text => "
                        "text.querySelectorAll('.given').length)")
    assert grey == [4, 4, 4]                               # the prompt was predicted by nobody


def test_what_could_reorder_or_hide_text_is_shown_as_an_escape():
    """A bidi override in a generated text once turned the page's own words around."""
    token = Token(1, " a\u202eb\x1b<", True, "\u2066\x07", 0.5, 0.1, -1.0, 1.0, None,
                  ((1, "\u202e", 0.5),), ((1, "\u202e", 0.5),))
    content = page.page([[token]], "model\u202e")
    assert "a\\u202eb\\x1b&lt;" in content and "\\u2066\\x07" in content
    assert not set(content) & {"\u202e", "\u2066", "\x1b", "\x07"}


def test_a_text_of_unpredicted_tokens_or_none_still_makes_a_page():
    assert "0 tokens" in page.page([[Token(1, "only")]], "toy")
    assert math.isfinite(len(page.page([[]], "toy")))
