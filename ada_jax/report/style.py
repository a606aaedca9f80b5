"""Style sheets of the web page and of its picture, in light and dark."""

COLOURS = """
:root { color-scheme: light dark; --ink: #1b212b; --soft: #5a6372; --line: #e1e5eb;
  --paper: #fff; --band: #f5f7fa; --mark: #1d5fc4; --hot: #f08c4a; --cold: #fff6ee;
  --c0: #1d5fc4; --c1: #b8480d; --c2: #0b7a6b; --c3: #8440b5; --c-paper: #6b7482; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9ba5b4; --line: #2b323d;
  --paper: #12161c; --band: #1a2029; --mark: #82b1ff; --hot: #9a3f12; --cold: #1d1a1b;
  --c0: #82b1ff; --c1: #ff9f5f; --c2: #4fd0bd; --c3: #cf9bff; --c-paper: #98a2b1; } }
"""

PICTURE = """
svg { font-family: system-ui, sans-serif; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c-paper { --c: var(--c-paper); }
.grid { stroke: var(--line); }
.equal { stroke: var(--soft); stroke-dasharray: 2 4; }
.tick, .axis { fill: var(--soft);  }
.axis { font-weight: 600; }
.middle { text-anchor: middle; } .end { text-anchor: end; }
.mark { fill: var(--c); stroke: var(--paper); stroke-width: 1.5; }
.c-paper .mark { fill: var(--paper); stroke: var(--c); stroke-width: 2; }
.spread { stroke: var(--c); stroke-width: 1.5; }
.arrow { stroke: var(--c); stroke-opacity: .5; stroke-width: 2; fill: none; }
.leader { stroke: var(--c); stroke-opacity: .45; }
.name { fill: var(--c); font-weight: 600; }
.label { fill: var(--c); stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round;
  paint-order: stroke; }
"""

PAGE = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 84rem;
  background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: clamp(1.5rem, 4vw, 2rem); line-height: 1.2; letter-spacing: -.01em;
  margin: 1.25rem 0 .5rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 3.5rem 0 .75rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; margin: .5rem 0 0;
  list-style: none; font-size: .875rem; }
a { color: var(--mark); text-underline-offset: .2em; }
main { margin-top: 2rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr));
  gap: 1.25rem 2rem; padding: 0; margin: 0 0 1.75rem; list-style: none; }
.facts li { border-left: 3px solid var(--c); padding-left: .9rem; font-size: .875rem;
  color: var(--soft); line-height: 1.45; }
.facts strong { display: block; color: var(--ink); font-size: 1.75rem; line-height: 1.3;
  font-weight: 600; font-variant-numeric: tabular-nums; }
.facts b { display: block; color: var(--c); font-weight: 600; }
.overview { display: block; width: 100%; height: auto; }
.narrow { display: none; }
.scroll { width: fit-content; max-width: 100%; overflow-x: auto; border: 1px solid var(--line);
  border-radius: .5rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .55rem; text-align: left; white-space: nowrap; }
.number { text-align: right; }
thead th { border-bottom: 1px solid var(--line); background: var(--band); color: var(--soft);
  font-weight: 600; vertical-align: bottom; white-space: normal; }
tbody { border-bottom: 1px solid var(--line); }
tbody:last-child { border-bottom: 0; }
tbody th { position: sticky; left: 0; background: var(--paper); font-weight: 500; }
tbody tr + tr > * { color: var(--soft); font-size: .8125rem; padding-top: 0; }
.dot { padding-left: 1.6rem; }
.dot::before { content: ""; position: absolute; left: .55rem; top: .8em; width: .6em; height: .6em;
  border: 2px solid var(--c); border-radius: 50%; background: var(--c); }
.dot.c-paper::before { background: none; }
.heat { font-size: .8125rem; }
.heat th, .heat td { padding: .3rem .4rem; }
.heat .dot { padding-left: 1.6rem; }
.heat .span { border-bottom: 0; text-align: center; padding-bottom: 0; }
.heat tbody { border-bottom: 0; }
.heat .shade { border: 1px solid var(--paper); padding: .3rem .25rem; text-align: center;
  min-width: 2.4rem;
  background: color-mix(in srgb, var(--hot) calc(var(--share) * 100%), var(--cold)); }
.heat thead .shade { border: 0; background: var(--band); font-weight: 500; line-height: 1; }
.shade span { display: inline-block; max-height: 8rem; writing-mode: vertical-rl;
  transform: rotate(180deg); }
.notes { color: var(--soft); font-size: .875rem; padding-left: 1.1rem; overflow-wrap: anywhere; }
figure { margin: 0 0 2rem; }
figure img { display: block; width: 100%; min-width: 44rem; background: #fff; }
figcaption { color: var(--soft); font-size: .875rem; margin-top: .75rem; max-width: 68rem;
  overflow-wrap: anywhere; }
@media (max-width: 60rem) {
  .overview { display: none; }
  .narrow { display: block; max-width: 34rem; }
}
@media (min-width: 48.01rem) { table:not(.heat) wbr { display: none; } }
@media (max-width: 48rem) {
  table, .heat { font-size: .8125rem; }
  th, td { padding-left: .35rem; padding-right: .35rem; }
  tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
}
"""
