"""A YAML file as the texts that stand in it: `1e-6`, `none` and `off` stay what one has typed, and every text knows its line.

YAML 1.1 reads `off` as false and `1e-6` as a word; a setting is read by its own rule (config.py) instead, as on the command line.
"""

from pathlib import Path
from typing import Any

from deepscale import errors
from deepscale.errors import UsageError

DEEPEST = 5  # containers in each other; an alias may stand for one that it is in


class Text(str):
    """A text, and where it stands, for messages: "components.yaml line 3"."""

    where: str

    def __new__(cls, text: str, where: str) -> "Text":
        self = super().__new__(cls, text)
        self.where = where
        return self


def where_of(text: str) -> str:
    """Where a text stands that may be a `Text`."""
    return getattr(text, "where", "")


def read(path: Path) -> dict[str, Any]:
    """The mapping in a file: `Text`s, in lists and mappings of them. Raises UsageError for what is no mapping, or no YAML."""
    try:
        import yaml
    except ImportError:
        raise errors.MissingPackageError("pyyaml", "sweep", "reading a space of settings") from None
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}){_others(path)}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text: its byte {error.start:,} is no UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path} line {mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or (str(error).splitlines() or ["nested too deeply"])[0]
        raise UsageError(f"{where} is not YAML: {reason}") from None
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{path} holds no `key: value`; a space begins for example with `question: Which activation trains best?`")
    found: dict[str, Any] = _plain(node, path, yaml, DEEPEST)
    return found


def _plain(node: Any, path: Path, yaml: Any, deepest: int) -> Any:
    where = f"{path} line {node.start_mark.line + 1}"
    if not deepest:
        raise UsageError(f"{where} is nested more deeply than anything in a space")
    if isinstance(node, yaml.ScalarNode):
        return Text(node.value, where)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(value, path, yaml, deepest - 1) for value in node.value]
    found: dict[str, Any] = {}
    for key_node, value in node.value:
        key = _plain(key_node, path, yaml, 1)
        if not isinstance(key, Text):
            raise UsageError(f"{where}: a name is missing before the colon")
        if key in found:
            raise UsageError(f"{key.where} says {key} again; leave one of the two out")
        found[key] = _plain(value, path, yaml, deepest - 1)
    return found


def _others(path: Path) -> str:
    folder = next(folder for folder in (path, path.parent, Path("tune/spaces"), Path()) if folder.is_dir())
    known = sorted(str(other) for other in folder.glob("*.yaml") if other.is_file())
    return f"; there are: {', '.join(known)}" if known else ""
