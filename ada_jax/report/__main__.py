"""Tables and figures from results files.

python -m ada_jax.report RESULTS...                      results.json files or folders of runs
python -m ada_jax.report RESULTS... --paper              with the paper's numbers
python -m ada_jax.report --paper --table=3 --format=csv  only the paper's table
python -m ada_jax.report RESULTS... --figures=DIR        figures, and a web page with everything
python -m ada_jax.report RESULTS... --format=robustbench --out=DIR   files for RobustBench

Table 1 has one line per method, table 2 the accuracy in balls of pixels, table 3 the error on each
corruption. 'list' has one line per results file, with its provenance. 'beside' is table 1 with the
paper's clean error and mCE in separate columns. Results that differ only in their seed become one
line, with mean and standard deviation. Errors are in percent; mCE is un-normalised, the mean over
corruptions and severities.
"""

import os

from absl import flags, logging

from ada_jax import locks, paths
from ada_jax import results as results_files
from ada_jax.errors import UserError, require_extra
from ada_jax.report import charts, grouping, overview, paper_tables, robustbench, tables, web_page
from ada_jax.run import cli


def main(argv: list[str]) -> None:
    """Prints the tables and draws the figures."""
    f = flags.FLAGS
    _check_flags(argv)
    files = [*charts.with_results(argv[1:]), *([str(results_files.PUBLISHED)] if f.paper else [])]
    everything = [result for file in files for result in results_files.read(file)]
    results = [result for result in everything if not result.published]
    if f.format == "robustbench":
        return _write_for_robustbench(f.out, results)
    ours, paper = (
        grouping.rows(results),
        grouping.rows(result for result in everything if result.published),
    )
    attacked = grouping.rows(result for result in results if "lp_accuracy" in result.fields)
    made = {
        "1": paper_tables.table_1(ours, paper),
        # The paper's rows are shown if ours have attacks too, or if there are none of ours.
        "2": paper_tables.table_2(attacked, paper if attacked or not results else []),
        "3": paper_tables.table_3(ours, paper),
        "list": paper_tables.table_list(results or everything, paper if results else []),
    }
    if "beside" in f.table:
        made["beside"] = paper_tables.table_beside(
            ours, grouping.rows(results_files.read(str(results_files.PUBLISHED)))
        )
    names = [name for name in f.table if made[name].groups]
    if not names:
        raise UserError(
            f"--table={','.join(f.table)} has nothing to show: give results files or folders of "
            "runs with these measurements, or choose another table."
        )
    if f.figures:
        cli.make_folder("figures", f.figures)
        with locks.hold(f"--figures={f.figures}", locks.of_folder(f.figures)):
            pictures = charts.draw(f.figures, ours, paper, results)
            written = [p.path for p in pictures if p.section == "figures"]
            groups = overview.groups(ours, paper)
            colours = overview.colours(groups, [*ours, *attacked, *paper])
            if groups:
                written.append(os.path.join(f.figures, "overview.svg"))
                paths.write(written[-1], overview.document(groups))
            written.append(os.path.join(f.figures, "index.html"))
            title = "Robustness to common corruptions"
            with_lines = [table for table in made.values() if table.groups]
            paths.write(written[-1], web_page.page(title, with_lines, pictures, groups, colours))
        for path in written:
            logging.info("wrote %s", path)
    print("\n\n".join(tables.FORMATS[f.format](made[name]) for name in names))


def _check_flags(argv: list[str]) -> None:
    f = flags.FLAGS
    known, formats = ("1", "2", "3", "list", "beside"), (*tables.FORMATS, "robustbench")
    if f.format not in formats:
        raise UserError(f"--format={f.format} is unknown: choose from {', '.join(formats)}.")
    if (f.format == "robustbench") != bool(f.out):
        raise UserError(
            f"--format={f.format} is given with --out={f.out!r}: give --out=FOLDER with "
            "--format=robustbench, and only with it."
        )
    for name in ("paper", "figures", "table"):
        if f.format == "robustbench" and f[name].present:
            raise UserError(f"--{name} does not apply to --format=robustbench: leave it out.")
    if unknown := [name for name in f.table if name not in known]:
        raise UserError(f"--table={unknown[0]} is unknown: choose from {', '.join(known)}.")
    if not argv[1:] and not f.paper:
        raise UserError(
            "There are no results to report: give results files or folders of runs, or --paper for "
            "the paper's numbers."
        )
    if f.figures:
        require_extra(f"--figures={f.figures}", "matplotlib")


def _write_for_robustbench(folder: str, results: list[results_files.Result]) -> None:
    cli.make_folder("out", folder)
    with locks.hold(f"--out={folder}", locks.of_folder(folder)):
        print("\n".join(robustbench.write(folder, results)))
    for result in results:
        for remark in robustbench.remarks(result):
            logging.warning("%s is not comparable to the leaderboard: %s.", result.file, remark)
    logging.info(
        "Fill in link, name, authors and venue of each model, and correct additional_data."
    )


if __name__ == "__main__":
    flags.DEFINE_string("format", "markdown", "markdown, latex, csv or robustbench.")
    flags.DEFINE_list("table", ["1", "2", "3", "list"], "Tables: 1, 2, 3, list, beside.")
    flags.DEFINE_bool("paper", False, "Whether to include the paper's numbers.")
    flags.DEFINE_string("figures", "", "Folder for figures and a web page, index.html.")
    flags.DEFINE_string("out", "", "Folder for --format=robustbench.")
    cli.start(main, arguments=True)
