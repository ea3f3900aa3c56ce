"""Hook of mkdocs: a link from a page to a file outside docs/ works on a code host, not in the site.

In the site such a link becomes its text and the file's path, or a link into `repo_url` where
mkdocs.yml sets one. A link to a file that does not exist stays, and `mkdocs build --strict` fails.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)#\s]*)\)")


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    folder = Path(page.file.abs_src_path).parent

    def replace(match: re.Match) -> str:
        text, target = match.groups()
        path = (folder / target).resolve()
        if path.is_relative_to(config.docs_dir) or not path.is_relative_to(ROOT):
            return match[0]
        if not path.exists():
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{name})"
        return text if name in text else f"{text} (`{name}`)"

    return LINK.sub(replace, markdown)
