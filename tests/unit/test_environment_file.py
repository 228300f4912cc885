"""systemd's EnvironmentFile= syntax: whatever is written is read back, by systemd's rules and by ours."""

from __future__ import annotations

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import environment_file
from hypothesis import example, given
from hypothesis import strategies as st

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
# Surrogates are no text, NUL is refused; every other character is fair.
VALUES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


def systemd_reads(content: str) -> dict[str, str]:  # noqa: C901 - one state machine, read best beside its source
    """Read an environment file as systemd 249 to 257 do: the state machine of src/basic/env-file.c, nothing more."""
    values: dict[str, str] = {}
    state, key, value, spaces = "pre_key", "", "", 0
    for char in content:
        newline = char in "\n\r"
        if state == "pre_key":
            if char in "#;":
                state = "comment"
            elif not newline and char not in " \t":
                state, key = "key", char
        elif state == "comment":
            state = "comment_escape" if char == "\\" else "pre_key" if newline else "comment"
        elif state == "comment_escape":
            state = "comment"
        elif state == "key":
            if newline:
                state = "pre_key"
            elif char == "=":
                state, value, spaces = "pre_value", "", 0
            else:
                key += char
        elif state == "pre_value":
            if newline:
                values[key.rstrip(" \t")] = value
                state = "pre_key"
            elif char in "'\"":
                state = "single" if char == "'" else "double"
            elif char == "\\":
                state = "value_escape"
            elif char not in " \t":
                state, value = "value", value + char
        elif state == "value":
            if newline:
                values[key.rstrip(" \t")] = value[: len(value) - spaces]
                state = "pre_key"
            elif char == "\\":
                state, spaces = "value_escape", 0
            else:
                spaces = spaces + 1 if char in " \t" else 0
                value += char
        elif state == "value_escape":
            state = "value"
            value += "" if newline else char
        elif state == "single":
            state, value = ("pre_value", value) if char == "'" else (state, value + char)
        elif state == "double":
            if char == '"':
                state = "pre_value"
            elif char == "\\":
                state = "double_escape"
            else:
                value += char
        elif state == "double_escape":
            state = "double"
            if char in '"\\`$':
                value += char
            elif char != "\n":
                value += "\\" + char
    return values


@given(st.dictionaries(NAMES, VALUES, max_size=5))
@example({"A": "two\nlines\\\n", "B": 'a "quoted" $HOME `id` %h \\', "C": "", "D": " spaced ", "E": "#no; comment"})
@example({"JSON": '{"0": {"model_ids": ["a\\nb"]}}', "TAIL": "\\", "CARRIAGE": "a\r\nb"})
def test_any_value_survives_writing_and_reading(variables: dict[str, str]) -> None:
    content = environment_file.render(variables, comment="Managed; don't edit \\\nsecond line")
    assert systemd_reads(content) == variables
    assert environment_file.parse(content) == variables


@given(NAMES, VALUES, NAMES, VALUES)
def test_a_value_cannot_write_another_variable(name: str, value: str, other: str, other_value: str) -> None:
    read = systemd_reads(environment_file.render({name: f'{value}"\n{other}="{other_value}'}))
    assert list(read) == [name]


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A B", "A=B", "A\n", "Ä"])
def test_a_name_that_no_environment_takes_is_refused(name: str) -> None:
    with pytest.raises(environment_file.EnvironmentFileError, match="not a name"):
        environment_file.assignment(name, "x")


def test_nul_is_refused_and_not_printed() -> None:
    with pytest.raises(environment_file.EnvironmentFileError) as failure:
        environment_file.assignment("KEY", "se\0cret")
    assert "KEY" in str(failure.value)
    assert "cret" not in str(failure.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "True"),
        (False, "False"),
        (3, "3"),
        (0.5, "0.5"),
        ("as is", "as is"),
        ({"b": 1, "a": [True, None]}, '{"a": [true, null], "b": 1}'),
        (["x", "ü"], '["x", "ü"]'),
    ],
)
def test_values_become_text_as_programs_expect_it(value: object, text: str) -> None:
    assert environment_file.text_of(value) == text


def test_lines_of_another_kind_are_passed_over() -> None:
    assert environment_file.parse('# note\n\nOTHER=plain\nexport X=1\nA="1"\n') == {"A": "1"}


def test_a_cut_file_is_read_as_far_as_it_goes() -> None:
    assert environment_file.parse('A="1"\nB="unfinished') == {"A": "1", "B": "unfinished"}
