"""Every static rule holds for the repository, and refuses a sample made to break it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import rules_repository
import rules_roles
import rules_tasks
from tree import Tree

ROOT = Path(__file__).parents[2]
TREE = Tree.of_checkout(ROOT)

# Every public function of these modules is a rule: it takes the tree and yields one sentence for each fault.
RULES = {
    name: function
    for module in (rules_repository, rules_roles, rules_tasks)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith("_")
}

SPEC = """# Specs.
argument_specs:
  main:
    short_description: Do it
    options:
"""


def spec(option: str) -> str:
    """Return an argument spec with one option."""
    return SPEC + "\n".join(f"      {line}" for line in option.splitlines()) + "\n"


def tasks(*lines: str, path: str = "roles/r/tasks/main.yml") -> dict[str, str]:
    """Return a task file with one task."""
    return {path: "# Tasks for a test.\n- name: Do it\n" + "".join(f"  {line}\n" for line in lines)}


R = "roles/r"
DEFAULTS, SPECS = f"{R}/defaults/main.yml", f"{R}/meta/argument_specs.yml"

# rule -> samples, each with words that its finding must hold.
BAD: dict[str, list[tuple[dict[str, str], str]]] = {
    "role_has_all_parts": [
        ({f"{R}/tasks/main.yml": "[]"}, "README.md is missing"),
        ({f"{R}/tasks/main.yml": "[]"}, "molecule/r is missing"),
    ],
    "spec_equals_defaults": [
        ({SPECS: spec("r_x: {type: int, default: 1}"), DEFAULTS: "r_x: 2"}, "1 in the spec and 2"),
        ({SPECS: spec("r_x: {type: int, default: 1}"), DEFAULTS: "{}"}, "not in the defaults"),
        ({SPECS: spec("r_x: {type: int}"), DEFAULTS: "r_x: 2"}, "None in the spec"),
        ({SPECS: spec("r_x: {type: int, default: 1}"), DEFAULTS: "{r_x: 1, r_y: 2}"}, "r_y is in the defaults"),
        ({SPECS: spec("r_x: {type: int, required: true}"), DEFAULTS: "r_x: 2"}, "required and has"),
    ],
    "defaults_have_the_type_of_the_spec": [
        ({SPECS: spec("r_x: {type: int, default: '1'}")}, "'1', and its type is int"),
        ({SPECS: spec("r_x: {type: int, default: true}")}, "True, and its type is int"),
        ({SPECS: spec("r_x: {type: list, options: {y: {type: str, default: 1}}}")}, "r_x.y is 1"),
    ],
    "options_are_described": [
        ({SPECS: spec("r_x: {type: int, default: 1}")}, "no description"),
        ({SPECS: spec("r_x: {type: int, description: No stop}")}, "no description"),
        ({SPECS: spec("r_x: {description: Fine.}")}, "the type None"),
        ({SPECS: spec("r_x: {type: list, description: Fine.}")}, "without elements"),
        ({SPECS: spec("r_x: {type: str, default: c, choices: [a, b], description: Fine.}")}, "not one of its choices"),
    ],
    "entry_points_exist": [
        ({SPECS: spec("r_x: {type: int}")}, "tasks/main.yml is missing"),
        (
            {SPECS: "argument_specs: {main: {options: {}}}", **tasks("ansible.builtin.meta: noop")},
            "no short_description",
        ),
    ],
    "variables_carry_the_role": [
        ({DEFAULTS: "port: 1"}, "port does not start with r_"),
        ({f"{R}/vars/main.yml": "r_port: 1"}, "r_port does not start with __r_"),
    ],
    "units_have_a_user_of_their_own": [
        ({f"{R}/templates/r.service.j2": "[Service]\nExecStart=/bin/true\n"}, "runs as root"),
        ({f"{R}/templates/r.service.j2": "[Service]\nUser=root\nExecStart=/bin/true\n"}, "runs as root"),
    ],
    "facts_are_read_by_bracket": [
        (tasks("when: ansible_facts.os_family == 'Debian'"), "by dot"),
        (tasks("when: ansible_distribution == 'Debian'"), "ansible_distribution, which would be"),
        ({f"{R}/templates/x.j2": "{{ ansible_default_ipv4 }}"}, "injected fact"),
    ],
    "names_inside_carry_the_role": [
        (tasks("register: result"), "register result"),
        (tasks("loop_control: {loop_var: item_x}"), "loop_var item_x"),
        (tasks("ansible.builtin.set_fact: {port: 1}"), "set_fact port"),
    ],
    "commands_say_why_and_when_changed": [
        (tasks("ansible.builtin.command: id"), "without changed_when"),
        (tasks("# No module does it.", "ansible.builtin.shell: id"), "without changed_when"),
        (
            {f"{R}/tasks/main.yml": "- name: A\n  ansible.builtin.command: id\n  changed_when: false\n"},
            "without a comment",
        ),
    ],
    "task_files_are_short": [
        ({f"{R}/tasks/main.yml": "- name: A\n  ansible.builtin.meta: noop\n" * 13}, "has 13 tasks"),
        (
            {f"{R}/tasks/main.yml": "- name: A\n  block:\n" + "    - name: A\n      ansible.builtin.meta: noop\n" * 13},
            "has 13 tasks",
        ),
    ],
    "handlers_rest_in_check_mode": [
        (tasks("ansible.builtin.systemd_service: {name: x}", path=f"{R}/handlers/main.yml"), "without 'when"),
    ],
    "secrets_are_hidden_by_one_variable": [(tasks("no_log: true"), "no_log is True")],
    "plays_gather_nothing": [({"site.yml": "- name: A\n  hosts: all\n"}, "gather_facts")],
    "roles_are_called_by_full_name": [
        ({"site.yml": "- name: A\n  hosts: all\n  roles: [r]\n", **tasks("ansible.builtin.meta: noop")}, "the role r"),
        (tasks("ansible.builtin.include_role: {name: selfhost.lmdeploy.nothing}"), "selfhost.lmdeploy.nothing"),
    ],
    "files_say_what_they_are_for": [
        ({"a.yml": "---\nx: 1\n"}, "a.yml"),
        ({"script/a": "#!/bin/sh\n# Short\nexit\n"}, "script/a"),
    ],
    "no_foreign_places": [
        ({"a.yml": "x: CHECKOUT/site.yml\n"}, "a.yml:1"),
        ({"a.txt": "--index-url https://pypi.org/simple\n"}, "a.txt:1"),
        ({"a.yml": "x: https://repo.anaconda.com/miniconda\n"}, "a.yml:1"),
    ],
    "lint_has_no_skip_list": [
        ({".config/ansible-lint.yml": "skip_list: [yaml]"}, "skip_list"),
        ({".ansible-lint-ignore": "x yaml"}, "hides findings"),
    ],
    "exceptions_give_their_reason": [
        ({"a.py": "\nx = 1  # noqa: E501\n"}, "a.py:2"),
        ({"a.py": "\nx = 1  # type: ignore[misc]\n"}, "a.py:2"),
        ({"a.yml": "---\nx: 1  # noqa: yaml[line-length] long\n"}, "a.yml:2"),
    ],
    "links_in_documents_resolve": [
        ({"docs/a.md": "[b](b.md)"}, "b.md"),
        ({"docs/a.md": "[b](#nothing)\n# Something\n"}, "no such heading"),
    ],
    "documented_variables_exist": [
        ({"README.md": "`r_y: 1`", SPECS: spec("r_x: {type: int}")}, "r_y"),
        ({"inventories/a/hosts.yml": "r_y: 1", SPECS: spec("r_x: {type: int}")}, "r_y"),
    ],
    "dependencies_are_told": [
        ({"requirements/a.in": "# Why.\nflask>=3\n", "docs/en/dependencies.md": "[flask-x](y)"}, "asks for flask"),
    ],
    "scenarios_have_checks": [
        ({"molecule/a/molecule.yml": "{}"}, "molecule/a"),
        ({"molecule/a/molecule.yml": "{}", "molecule/a/tests/test_a.py": "x = 1"}, "molecule/a"),
    ],
    "claims_name_tests_that_exist": [({"docs/en/a.md": "`test_that_is_gone`"}, "no test_that_is_gone")],
    "scripts_can_be_started": [({"script/a": "echo\n"}, "no interpreter")],
}


@pytest.mark.parametrize("name", sorted(RULES))
def test_repository_keeps_rule(name: str) -> None:
    """The repository gives no finding."""
    findings = list(RULES[name](TREE))
    assert not findings, f"{RULES[name].__doc__}\n" + "\n".join(findings)


@pytest.mark.parametrize(
    ("name", "sample", "words"),
    [(name, sample, words) for name, samples in BAD.items() for sample, words in samples],
)
def test_rule_refuses_sample(name: str, sample: dict[str, str], words: str, tmp_path: Path) -> None:
    """The rule finds the fault that the sample was made with; CHECKOUT stands for where the repository lies."""
    texts = {path: text.replace("CHECKOUT", str(tmp_path)) for path, text in sample.items()}
    findings = list(RULES[name](Tree.of_texts(tmp_path, texts)))
    assert any(words in finding for finding in findings), findings


def test_every_rule_has_a_sample() -> None:
    """No rule is trusted that was not seen to refuse something."""
    assert RULES.keys() == BAD.keys()
