"""The book's page of measurements: the stored results of ``python -m benchmarks`` and ``python -m benchmarks.codegen``."""

from __future__ import annotations

import html
import json
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

from ..figures import COLOURS, as_json, figure
from .renderers import figure_html

OURS = ("reference", "parallel", "triton")


class Benchmarks(Directive):
    """``{benchmarks} cpu``, ``{benchmarks} cuda`` or ``{benchmarks} codegen``: what was last measured there."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Build a line of provenance, a figure and the table; or a sentence that says how to measure."""
        env, what = self.state.document.settings.env, self.arguments[0]
        folder = Path(env.srcdir) / "benchmarks" / "results"
        names = ["sm_75", "sm_80", "sm_90"] if what == "codegen" else [what]
        files = [folder / f"{name}.json" for name in names]
        for file in files:
            env.note_dependency(str(file))
        found = [json.loads(f.read_text(encoding="utf-8")) for f in files if f.exists()]
        if len(found) < len(files):
            command = "codegen 75 --store" if what == "codegen" else f"--device {what} --store"
            command = f"python -m benchmarks{'.' if what == 'codegen' else ' '}{command}"
            text = f"<p>Nothing is stored here yet: <code>{command}</code> measures it.</p>"
        elif what == "codegen":
            text = codegen_html(dict(zip(names, found, strict=True)))
        else:
            text = results_html(found[0])
        return [nodes.raw(text=text, format="html")]


def results_html(report: dict) -> str:
    """The provenance, one figure and the whole table of a run."""
    cases: dict[str, list[dict]] = {}
    for row in report["rows"]:
        shape = ", ".join(f"{k}&nbsp;{v}" for k, v in row["shape"].items())
        cases.setdefault(f"{row['kernel']} ({shape})", []).append(row)
    facts = " · ".join(f"{html.escape(k)} {html.escape(str(v))}" for k, v in report["machine"].items())
    ceilings = (
        f"ceilings measured in the same run: copy {report['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"matrix product {report['matrix_flop_per_s'] / 1e9:.0f} GFLOP/s"
    )
    parts = [f"<p>{facts} · {report['dtype']}; {ceilings}.</p>", _speed_figure(cases)]
    head = (
        "implementation", "forward ms", "fwd + bwd ms", "20 to 80 %", "× loop", "× best peer", "GB/s", "GFLOP/s",
        "of roofline", "peak MB",
    )  # fmt: skip
    parts.append("<table><thead><tr>" + "".join(f"<th>{h}</th>" for h in head) + "</tr></thead><tbody>")
    for name, rows in cases.items():
        parts.append(f'<tr><th colspan="{len(head)}">{name}</th></tr>')
        times = {r["implementation"]: r["both"]["median_ms"] for r in rows if "both" in r}
        parts += [_row(row, times, len(head)) for row in rows]
    return "".join([*parts, "</tbody></table>"])


def _row(row: dict, times: dict[str, float], width: int) -> str:
    label = html.escape(row["implementation"])
    if "both" not in row:
        return f'<tr><td>{label}</td><td colspan="{width - 1}">{html.escape(row["note"])}</td></tr>'
    both, peers = row["both"], [t for k, t in times.items() if k not in OURS]
    mine = row["implementation"] in OURS
    cells = (
        f"{row['forward']['median_ms']:.2f}", f"{both['median_ms']:.2f}",
        f"{both['p20_ms']:.1f}&nbsp;to&nbsp;{both['p80_ms']:.1f}",
        f"{times['reference'] / both['median_ms']:.1f}" if "reference" in times else "",
        f"{min(peers) / both['median_ms']:.2f}" if peers and mine else "",
        f"{both['GB_per_s']:.1f}", f"{both['GFLOP_per_s']:.1f}", f"{both['fraction_of_roofline']:.0%}", f"{row['peak_MB']:.1f}",
    )  # fmt: skip
    return f"<tr><td>{label}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


def _speed_figure(cases: dict[str, list[dict]]) -> str:
    """How many times faster than the loop each of our other implementations and the best peer is."""
    speed: dict[str, dict[str, float]] = {}
    for name, rows in cases.items():
        times = {r["implementation"]: r["both"]["median_ms"] for r in rows if "both" in r}
        if "reference" not in times:
            continue
        peers = [t for k, t in times.items() if k not in OURS]
        for label, time in {**times, "best peer": min(peers, default=None)}.items():
            if time is not None and label in ("parallel", "triton", "best peer"):
                speed.setdefault(label, {})[name.replace("&nbsp;", " ")] = times["reference"] / time
    rows = len({name.split(" (")[0] for name in cases})
    fig = figure(x="speed, loop = 1", height=140 + 24 * rows)
    colours = {"parallel": COLOURS[0], "triton": COLOURS[1], "best peer": COLOURS[2]}
    for label, values in speed.items():
        kernels = [name.split(" (")[0] for name in values]
        fig.add_scatter(
            y=kernels, x=[round(v, 2) for v in values.values()], name=label, mode="markers", customdata=list(values),
            marker=dict(color=colours[label], size=10, symbol="diamond" if label == "best peer" else "circle"),
            hovertemplate="%{customdata}: %{x:.1f} times the loop<extra>" + label + "</extra>",
        )  # fmt: skip
    fig.add_vline(x=1, line=dict(color="#888", width=1))
    fig.update_layout(legend=dict(orientation="h", x=0, y=1, yanchor="bottom"))
    fig.update_xaxes(type="log", dtick=1)
    fig.update_yaxes(autorange="reversed", automargin=True, dtick=1)
    caption = (
        "Speed relative to the plain loop over time, forward and backward, on the same tensors in the same run; one mark "
        "for each shape at which the loop was timed."
    )
    alt = "One row a kernel, on a logarithmic axis: how many times faster than the loop its parallel form and its peers run."
    return figure_html(as_json(fig, {"caption": caption, "alt": alt}))


def codegen_html(chips: dict[str, dict]) -> str:
    """Registers, spills and shared memory of every Triton kernel on every chip."""
    head = "".join(f'<th colspan="3">{chip}</th>' for chip in chips)
    parts = [f'<table><thead><tr><th rowspan="2">kernel</th>{head}</tr><tr>']
    parts += ["<th>registers</th><th>spilled&nbsp;B</th><th>shared&nbsp;B</th>"] * len(chips)
    parts.append("</tr></thead><tbody>")
    for name in sorted(set().union(*(report["kernels"] for report in chips.values()))):
        parts.append(f"<tr><td><code>{name}</code></td>")
        for report in chips.values():
            e = report["kernels"].get(name)
            parts.append(
                f"<td>{e['registers']}</td><td>{e['stack']}</td><td>{e['shared']:,}</td>" if e else "<td></td>" * 3
            )
        parts.append("</tr>")
    triton = next(iter(chips.values()))["triton"]
    return f"<p>Compiled by Triton {triton}; the largest of all variants.</p>" + "".join([*parts, "</tbody></table>"])
