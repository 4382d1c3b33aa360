"""Lets mkdocstrings read the docstring style of the Hugging Face libraries (a griffe extension; see mkdocs.yml).

That style writes parameters as ``name (`type`, *optional*, defaults to `x`):`` and references as ``[`~module.Name`]``.
"""

import re

from griffe import Alias, Extension, Object

PACKAGE = "trl_grpo_ext"
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")
SECTION = re.compile(r"^(Args|Parameters|Returns|Raises):$")
ENTRY = re.compile(r"^( {4})(\*{0,2}\w+ \()?(.*[`\]*].*?)(\))?:( .*)?$")


class HFDocstrings(Extension):
    """Rewrites docstrings once the whole package is known, so that references find their object."""

    def on_package(self, *, pkg, **kwargs) -> None:
        if pkg.name == PACKAGE:
            paths: dict[str, str] = {}
            objects = [obj for obj in walk(pkg) if obj.docstring is not None]
            for obj in walk(pkg):
                paths.setdefault(obj.name, public_path(obj))
            for obj in objects:
                obj.docstring.value = convert(obj.docstring.value, paths)


def walk(obj: Object):
    yield obj
    for member in obj.members.values():
        if not isinstance(member, Alias):
            yield from walk(member)


def public_path(obj: Object) -> str:
    """`trl_grpo_ext.X` for what the package exports, else the path of the definition."""
    exported = obj.package.members.get(obj.name)
    return f"{PACKAGE}.{obj.name}" if isinstance(exported, Alias) else obj.path


def convert(text: str, paths: dict[str, str]) -> str:
    lines, section = [], ""
    for line in text.splitlines():
        if match := SECTION.match(line):
            section = match[1]
        elif line and not line.startswith(" "):
            section = ""
        elif section and (match := ENTRY.match(line)):
            indent, name, kind, closing, rest = (part or "" for part in match.groups())
            kind = re.sub(r"(?<=[`\]]), (?=[`\[])", " or ", kind)
            kind = REFERENCE.sub(lambda m: m[2].split(".")[-1], kind)
            kind = re.sub(r", defaults to .*$", "", kind)  # mkdocstrings shows the default of the signature
            kind = kind.replace("`", "").replace("*", "")
            if section == "Returns":
                kind += " "  # griffe strips a bracket at the end of a return type
            line = f"{indent}{name}{kind}{closing}:{rest}"
        lines.append(REFERENCE.sub(lambda m: link(m[2], bool(m[1]), paths), line))
    return "\n".join(lines)


def link(path: str, is_short: bool, paths: dict[str, str]) -> str:
    """A link where the object is on one of the pages, plain code otherwise."""
    name = path.split(".")[-1]
    code = f"<code>{name if is_short else path}</code>"
    return f'<autoref optional identifier="{paths[name]}">{code}</autoref>' if name in paths else code
