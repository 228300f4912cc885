"""Rules on tasks: names, facts, commands, size, handlers, secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tree import LINE, Tree, plain

MAX_TASKS = 12
COMMANDS = ("ansible.builtin.command", "ansible.builtin.shell", "ansible.builtin.raw", "ansible.builtin.script")
SERVICES = ("ansible.builtin.service", "ansible.builtin.systemd", "ansible.builtin.systemd_service")
ROLE_MODULES = ("ansible.builtin.include_role", "ansible.builtin.import_role")
COLLECTION = "selfhost.lmdeploy."

# Connection and magic variables: they exist without facts.
NOT_FACTS = re.compile(
    r"ansible_(facts|check_mode|diff_mode|verbosity|version|managed|failed_(result|task)|play_\w+|run_tags|skip_tags"
    r"|loop(_var)?|index_var|host|port|user|password|connection|python_interpreter|playbook_python|config_file"
    r"|inventory_sources|limit|search_path|parent_role_\w+|role_name|collection_name|collections|forks|become\w*|ssh_\w+)"
    r"\b"
)
ANSIBLE_NAME = re.compile(r"(?<![\w./-])ansible_[a-z]\w*\b(?!\s*\.\s*(?:builtin|collections))")
DOT_FACT = re.compile(r"ansible_facts\.(?!get\b|keys\b|items\b)\w+")


def _code(text: str) -> str:
    """Return the text without its comment lines."""
    return "\n".join("" if line.lstrip().startswith("#") else line for line in text.splitlines())


def facts_are_read_by_bracket(tree: Tree) -> Iterator[str]:
    """Facts are ansible_facts['x']: no injected fact, no dot."""
    for name in tree.match(
        "roles/**.yml", "roles/**.j2", "playbooks/**.yml", "molecule/*/converge.yml", "inventories/**.yml"
    ):
        for number, line in enumerate(_code(tree.text(name)).splitlines(), 1):
            if DOT_FACT.search(line):
                yield f"{name}:{number} reads a fact by dot: {line.strip()}"
            for found in ANSIBLE_NAME.findall(line):
                if not NOT_FACTS.fullmatch(found):
                    yield f"{name}:{number} uses {found}, which would be an injected fact"


def names_inside_carry_the_role(tree: Tree) -> Iterator[str]:
    """Registers and loop variables start with __ROLE_, facts that a task sets with ROLE_ or __ROLE_."""
    for task in tree.tasks():
        inner = tuple(f"__{owner}_" for owner in task.owners)
        registered = task.keys.get("register")
        if isinstance(registered, str) and not registered.startswith(inner):
            yield f"{task.where}: register {registered} does not start with {inner[0]}"
        variable = (task.keys.get("loop_control") or {}).get("loop_var")
        if variable and not variable.startswith(inner):
            yield f"{task.where}: loop_var {variable} does not start with {inner[0]}"
        # A playbook may set a role's variable: that is how roles that know no other host learn of one.
        owners = tuple(f"{owner}_" for owner in (*task.owners, *(() if task.role else tree.roles())))
        for name in plain(task.keys.get("ansible.builtin.set_fact") or {}):
            if name != "cacheable" and not name.removeprefix("__").startswith(owners):
                yield f"{task.where}: set_fact {name} carries no role's name"


def commands_say_why_and_when_changed(tree: Tree) -> Iterator[str]:
    """A command has a comment that says why no module does it, and an honest changed_when."""
    for task in tree.tasks():
        if not any(m in task.keys for m in COMMANDS):
            continue
        if "changed_when" not in task.keys:
            yield f"{task.where}: a command without changed_when"
        lines = tree.text(task.path).splitlines()
        last = next((i for i in range(task.line + 1, len(lines)) if re.match(r"\s*- name:", lines[i])), len(lines))
        above = lines[max(0, task.line - 1)]
        if not any(line.lstrip().startswith("#") for line in [above, *lines[task.line : last]]):
            yield f"{task.where}: a command without a comment that says why no module does it"


def task_files_are_short(tree: Tree) -> Iterator[str]:
    """A task file has at most 12 tasks, those in blocks counted, blocks not."""
    counts: dict[str, int] = {}
    for task in tree.tasks():
        counts[task.path] = counts.get(task.path, 0) + (0 if "block" in task.keys else 1)
    for path in tree.task_files():
        if counts.get(path, 0) > MAX_TASKS:
            yield f"{path} has {counts[path]} tasks, more than {MAX_TASKS}"


def handlers_rest_in_check_mode(tree: Tree) -> Iterator[str]:
    """A handler on a service does nothing in check mode: the unit may not exist yet."""
    for task in tree.tasks():
        if task.handler and any(m in task.keys for m in (*SERVICES, *COMMANDS)):
            condition = task.keys.get("when", "")
            if "not ansible_check_mode" not in str(condition):
                yield f"{task.where}: a handler without 'when: not ansible_check_mode'"


def secrets_are_hidden_by_one_variable(tree: Tree) -> Iterator[str]:
    """Inside a role no_log is the role's own _secure_logging, so that one variable opens it for a search."""
    for task in tree.tasks():
        hidden = task.keys.get("no_log")
        wanted = [f"{{{{ {task.role}_secure_logging{also} }}}}" for also in ("", " | bool")]
        if task.role and hidden is not None and hidden not in wanted:
            yield f"{task.where}: no_log is {hidden!r} instead of {task.role}_secure_logging"


def plays_gather_nothing(tree: Tree) -> Iterator[str]:
    """Every play says gather_facts: false; roles gather what they need."""
    for name, play in tree.plays():
        if "hosts" in play and play.get("gather_facts") is not False:
            yield f"{name}:{play[LINE] + 1} does not say gather_facts: false"


def roles_are_called_by_full_name(tree: Tree) -> Iterator[str]:
    """A role is called as selfhost.lmdeploy.NAME, and it exists."""
    called = [
        (f"{name}:{play[LINE] + 1}", entry if isinstance(entry, str) else entry.get("role", ""))
        for name, play in tree.plays()
        for entry in play.get("roles") or []
    ]
    called += [(t.where, t.keys[module]["name"]) for t in tree.tasks() for module in ROLE_MODULES if module in t.keys]
    known = {COLLECTION + role for role in tree.roles()}
    for where, role in called:
        if role not in known and "{{" not in role:
            yield f"{where} calls the role {role}, which is not one of this collection's"
