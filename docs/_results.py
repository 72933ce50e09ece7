"""A hook of mkdocs: the figures of benchmarks/results are part of the site, so that a page may link
them where they lie."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = "benchmarks/results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted((Path(config.config_file_path).parent / RESULTS).iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    return markdown.replace(f"](../{RESULTS}/", "](results/")
