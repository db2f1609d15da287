"""The look of every page that is written here: one column, light and dark, from a phone's width up, and on paper."""

_FIRST = """
:root{--paper:#fbfaf7;--card:#fff;--ink:#1d2330;--quiet:#626b7b;--line:#e3e0d8;--train:#2f6f8f;--validation:#d39a2d;
--test:#b5495b;--all:#7b8794;--good:#2e7d4f;--good-back:#e6f3ea;--look:#a4551a;--look-back:#fbeedd;
color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#14171d;--card:#1c2029;--ink:#e6e8ec;--quiet:#98a1b1;--line:#2f3541;
--train:#5aa6cb;--validation:#e2b659;--test:#e07d8d;--all:#8b96a5;--good:#7fd0a0;--good-back:#183024;--look:#f0ae72;
--look-back:#35261a}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
overflow-wrap:anywhere}
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}
h1{font:600 clamp(1.6rem,5vw,2.4rem)/1.15 Georgia,"Times New Roman",serif;margin:.2em 0 .5em}
h2{font:600 1.35rem/1.25 Georgia,"Times New Roman",serif;margin:2.4em 0 .6em;padding-top:.9em;
border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.3em 0 .4em}
p{margin:.5em 0;max-width:46em}.quiet,figcaption,small{color:var(--quiet);font-size:.88rem}
.kicker{letter-spacing:.12em;text-transform:uppercase;font-size:.75rem;color:var(--quiet);margin:0}
.verdict{border-radius:10px;padding:16px 20px;margin:18px 0;border-left:6px solid}
.verdict b{font:600 1.3rem/1.3 Georgia,serif;display:block}
.sound{background:var(--good-back);border-color:var(--good)}.sound b{color:var(--good)}
.look{background:var(--look-back);border-color:var(--look)}.look b{color:var(--look)}
.verdict ul{margin:.5em 0 0;padding-left:1.2em}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:10px;margin:18px 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.tile b{display:block;font-size:1.45rem;font-variant-numeric:tabular-nums;line-height:1.25}
.tile span{color:var(--quiet);font-size:.85rem}
table{border-collapse:collapse;width:100%}table{overflow-wrap:normal}code,li{overflow-wrap:anywhere}
td,th{padding:5px 10px 5px 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}th{font-weight:600;font-size:.85rem;color:var(--quiet)}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
th.number{padding-right:10px}.share{width:38%;min-width:90px;padding-top:11px}
.bar{display:flex;height:9px;border-radius:5px;overflow:hidden;
background:color-mix(in srgb,var(--line) 60%,transparent)}
.bar i{display:block;min-width:1px}
"""
_LAST = """code{font:.86em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details{margin:.6em 0}summary{cursor:pointer}li{margin:.2em 0}
@media print{.class,.pair{break-inside:avoid;content-visibility:visible}body{background:#fff}}
@media(max-width:560px){.share{display:none}td,th{font-size:.86rem}.number{white-space:normal}
main{padding:20px 14px 48px}td,th{padding-right:7px}}
"""


def style(own: str = "") -> str:
    """The style of a page, with rules of its `own` after those for all, before those for phones and paper."""
    return f"{_FIRST}{own}{_LAST}"
