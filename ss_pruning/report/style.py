"""The style sheet of the HTML report: light and dark, phone and desktop, and print."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --muted: #59636e; --line: #d5dae0;
  --raised: #f4f6f8; --dense: #87919e; --pruned: #0b6bcb; --cut: #c2410c; --box: #9cc4ec;
  --good: #1a7f37; --link: #0b5cad;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --ink: #e6e9ed; --muted: #9aa5b1; --line: #333b45; --raised: #1d232a;
    --dense: #74808e; --pruned: #58a6ff; --cut: #fb8147; --box: #2b5a8c; --good: #4ac26b;
    --link: #79b8ff;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: auto; }
body {
  margin: 0 auto; max-width: 62rem; padding: 1.25rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 {
  font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
.kind { margin: 0; color: var(--muted); }
.lead { font-size: 1.1rem; margin: 0; max-width: 44rem; }
.note { color: var(--muted); font-size: .9rem; max-width: 44rem; margin: .25rem 0 .75rem; }
.muted { color: var(--muted); font-weight: 400; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
nav ul {
  list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; padding: 0; margin: 1rem 0 0;
  font-size: .9rem;
}
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem .4rem 0; text-align: left; vertical-align: top; }
tbody tr { border-top: 1px solid var(--line); }
.headline { width: 100%; max-width: 44rem; }
.headline th:not(:first-child), .headline td:not(:first-child) {
  text-align: right; padding-right: 0; padding-left: .6rem;
}
.headline thead th { color: var(--muted); font-weight: 400; font-size: .9rem; }
.headline tbody th { font-weight: 400; }
.headline td:nth-child(3) { font-weight: 600; }
.headline tbody td { white-space: nowrap; }
.both { max-width: 100%; }
.both tbody td { white-space: normal; }
.both td:nth-child(3) { font-weight: 400; }
.facts th { font-weight: 400; color: var(--muted); min-width: 8rem; }
.facts td { overflow-wrap: anywhere; }
.verdict {
  background: var(--raised); border-left: 4px solid var(--good); padding: .6rem .8rem;
  max-width: 44rem; margin: 1rem 0 0;
}
.verdict.open { border-left-color: var(--cut); }
.nobreak { white-space: nowrap; }
.mark { color: var(--good); font-weight: 700; }
code, pre, .name {
  font-family: ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
}
code, pre { font-size: .85rem; }
pre {
  background: var(--raised); padding: .7rem .8rem; margin: .25rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere;
}
.rows { list-style: none; margin: 0; padding: 0; }
.rows li, .axis {
  display: grid; grid-template-columns: minmax(0,17rem) 6.5rem minmax(0,1fr); column-gap: .75rem;
  align-items: center;
}
.rows li { padding: 1px 0; break-inside: avoid; }
.axis {
  position: sticky; top: 0; background: var(--paper); border-bottom: 1px solid var(--line); z-index: 1;
}
.axis .figure { grid-column: 3; height: 18px; }
.axis text { fill: var(--muted); font-size: 11px; }
.name { font-size: .78rem; line-height: 1.25; overflow-wrap: anywhere; }
.numbers {
  font-size: .8rem; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
  color: var(--muted);
}
.figure { display: block; width: 100%; height: 22px; overflow: visible; }
.dense { fill: var(--dense); }
.pruned { fill: var(--pruned); }
.cut { fill: var(--cut); }
.track { fill: var(--line); }
.violin { fill: var(--box); stroke: var(--pruned); stroke-width: 1; vector-effect: non-scaling-stroke; }
.dot { fill: var(--dense); }
.grid { stroke: var(--line); stroke-width: 1; }
.whisker { stroke: var(--pruned); stroke-width: 4; }
.median { stroke: var(--ink); stroke-width: 2; }
.gap { fill: var(--paper); }
.legend { display: block; white-space: nowrap; margin-top: .4rem; }
.key { margin-right: .9rem; }
.swatch { width: .8rem; height: .8rem; margin-right: .35rem; vertical-align: -.08rem; }
.whole dt { font-weight: 600; margin-top: .75rem; }
.whole dd { margin: .15rem 0 0; overflow-wrap: anywhere; }
details { margin-top: .25rem; }
summary { cursor: pointer; color: var(--link); }
@media (max-width:40rem) {
  .rows li { grid-template-columns: minmax(0,1fr) auto; padding: .25rem 0; }
  .rows .figure, .axis .figure { grid-column: 1/-1; }
  .axis { grid-template-columns: minmax(0,1fr); }
  th, td { padding-right: .4rem; }
  .headline { font-size: .9rem; }
  .headline th:not(:first-child), .headline td:not(:first-child) { padding-left: .35rem; }
  .both { font-size: .82rem; }
  .both th:not(:first-child), .both td:not(:first-child) { padding-left: .3rem; }
  .facts th { min-width: 6.5rem; }
}
@media print {
  :root {
    --paper: #fff; --ink: #000; --muted: #444; --line: #ccc; --raised: #f4f4f4; --dense: #87919e;
    --pruned: #0b6bcb; --cut: #c2410c; --box: #9cc4ec; --good: #1a7f37; --link: #000;
  }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav { display: none; }
  .axis { position: static; }
  h2, h3 { break-after: avoid; }
  table, .verdict { break-inside: avoid; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
}
"""
