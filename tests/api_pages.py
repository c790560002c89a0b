"""`make docs`: the API reference, from the docstrings of the modules that other code imports or implements."""

from __future__ import annotations

import re
import sys
from pathlib import Path

MODULES = (
    "callosum",
    "callosum.model",
    "brain_models.atlas",
    "brain_models.bundle",
    "brain_models.embedding",
    "brain_models.models",
    "brain_models.space",
    "configs.entry",
    "data_sharding.read.open_shards",
    "data_sharding.read.shard_set",
    "data_sharding.scans",
    "data_sharding.schema",
    "data_sharding.sources",
    "data_sharding.splits",
    "training.statistics",
    "training.study",
    "training.task",
)


def write(folder: Path) -> None:
    """Writes one page per module, an index and a search; needs pdoc, of the extra `docs`."""
    import pdoc

    import callosum

    vars(callosum).update(
        {name: getattr(callosum, name) for name in callosum.__all__}
    )  # they are imported when asked for
    pdoc.render.configure(docformat="markdown", footer_text=f"Callosum {callosum.__version__}")
    pdoc.pdoc(*MODULES, output_directory=folder)


def broken_links(folder: Path) -> list[str]:
    """The links between the pages that lead nowhere, each as <page>: <link>; other sites are not visited."""
    pages = sorted(folder.rglob("*.html"))
    text_of = {
        page: re.sub(r"<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL) for page in pages
    }
    ids = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in text_of.items()}
    broken = []
    for page, text in text_of.items():
        for link in re.findall(r'\bhref="([^"]+)"', text):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if "://" not in link and not (target in ids and (not anchor or anchor in ids[target])):
                broken.append(f"{page.relative_to(folder)}: {link}")
    return broken


if __name__ == "__main__":
    location = Path(sys.argv[1]).resolve()
    write(location)
    if found := broken_links(location):
        sys.exit("broken links:\n" + "\n".join(found))
    print(f"wrote {location}/index.html")
