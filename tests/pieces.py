"""Copy a piece of the repository with all that it needs into one file: what an engineer does by hand."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def definitions(path: Path) -> tuple[dict[str, ast.stmt], dict[str, ast.stmt]]:
    """The top-level definitions of a file, and its imports, by name."""
    defined: dict[str, ast.stmt] = {}
    imported: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)):
                defined[name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                one = type(node)(**{**vars(node), "names": [alias]})
                imported[alias.asname or alias.name.partition(".")[0]] = one
    return defined, imported


class Inline(ast.NodeTransformer):
    """unet.ResBlock -> ResBlock, for modules of common; notes which names that makes."""

    def __init__(self, modules: dict[str, Path]):
        self.modules, self.names = modules, []

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id in self.modules:
            self.names.append((self.modules[node.value.id], node.attr))
            return ast.Name(node.attr, node.ctx)
        return node


def copied(path: Path, *names: str) -> str:
    """The source of these names with everything of ours that they use, in an order that runs."""
    done: dict[tuple[Path, str], str] = {}
    imports: dict[str, None] = {}

    def take(file: Path, name: str) -> None:
        if (file, name) in done:
            return
        defined, imported = definitions(file)
        modules = {}
        for alias, node in imported.items():
            if isinstance(node, ast.ImportFrom) and node.module == "common":
                target = ROOT / "common" / f"{alias}.py"
                if target.exists():
                    modules[alias] = target
        if name in imported and name not in defined:
            node = imported[name]
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("common"):
                inner = (node.module or "").partition(".")[2]
                source = ROOT / "common" / (f"{inner}.py" if inner else "__init__.py")
                take(source, node.names[0].name)
            else:
                imports[ast.unparse(node)] = None
            return
        if name not in defined:
            return
        done[file, name] = ""  # a definition may use itself
        inline = Inline(modules)
        node = inline.visit(defined[name])
        used = sorted({n.id for n in ast.walk(node) if isinstance(n, ast.Name)})
        for other in inline.names:
            take(*other)
        for other in used:
            if other != name and (other in defined or other in imported):
                take(file, other)
        done.pop((file, name))
        done[file, name] = ast.unparse(node)

    for name in names:
        take(path, name)
    return "\n".join(imports) + "\n\n\n" + "\n\n\n".join(dict.fromkeys(done.values())) + "\n"
