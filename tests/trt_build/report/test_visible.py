"""Text of others cannot become markup, and what cannot be seen is shown."""

from __future__ import annotations

import math

import pytest

from trt_build.report.visible import bytes_text, change, escaped, number, percent, shown_text, token_text


def test_markup_in_a_text_is_text():
    assert escaped("<b a=\"1\" c='2'>&") == "&lt;b a=&quot;1&quot; c=&#x27;2&#x27;&gt;&amp;"
    assert shown_text("<script>") == "<bdi>&lt;script&gt;</bdi>"
    assert "<script>" not in token_text(" <script> ")


@pytest.mark.parametrize(
    ("text", "sign"),
    [("\n", "⏎"), ("\t", "⇥"), ("\x00", "⟨U+0000⟩"), ("\x1b", "⟨U+001B⟩"), ("\u202e", "⟨U+202E⟩"),
     ("\u2066", "⟨U+2066⟩"), ("\u200b", "⟨U+200B⟩"), ("\ud800", "⟨U+D800⟩"), ("\u2028", "⟨U+2028⟩"),
     ("\ufeff", "⟨U+FEFF⟩")],
)  # fmt: skip
def test_control_characters_are_shown(text, sign):
    assert shown_text(f"a{text}b") == f'<bdi>a<i class="sign">{sign}</i>b</bdi>'
    assert token_text(text) == f'<code><bdi><i class="sign">{sign}</i></bdi></code>'
    if text not in "\n\t":
        assert escaped(text) == sign


def test_words_of_other_scripts_stay_whole():
    hindi = "क\u094d\u200dष"
    assert shown_text(hindi) == f"<bdi>{hindi}</bdi>"


def test_spaces_at_the_ends_of_a_token_are_shown_and_an_empty_token_is_named():
    assert token_text("  a b ") == ('<code><i class="sign">␣␣</i><bdi>a b</bdi><i class="sign">␣</i></code>')
    assert token_text(" ") == '<code><i class="sign">␣</i></code>'
    assert token_text("") == '<i class="sign">no text</i>'
    assert shown_text("a\nb", breaks=True) == '<bdi>a<i class="sign">⏎</i>\nb</bdi>'


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "none"), (0.0, "0"), (0.04334, "0.043"), (0.00099996, "0.0010"), (7.69e-5, "7.7e−5"), (3.14, "3.1"),
     (42.4, "42"), (2726.4, "2,726"), (-0.5, "-0.50"), (math.nan, "nan"), (math.inf, "inf")],
)  # fmt: skip
def test_numbers_have_two_digits_that_count(value, text):
    assert number(value) == text


def test_units():
    assert (percent(0.83981), percent(None), percent(1.0, 0)) == ("84.0 %", "none", "100 %")
    assert (change(0.0024), change(-1e-8), change(0.03)) == ("+0.24 %", "−1.0e−6 %", "+3.0 %")
    assert (bytes_text(4_100_000), bytes_text(4_295_290_880)) == ("4.1 MB", "4.30 GB")
