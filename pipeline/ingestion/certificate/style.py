"""The look of the certificate's page: one column, light and dark, from a phone's width up, and on paper."""

STYLE = """
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
.train{background:var(--train);fill:var(--train)}.validation{background:var(--validation);fill:var(--validation)}
.test{background:var(--test);fill:var(--test)}i.all{background:var(--all)}
.legend span{display:inline-block;margin-right:16px;font-size:.88rem}
.legend i{display:inline-block;width:11px;height:11px;
border-radius:3px;margin-right:6px}
.skyline{display:block;width:100%;height:150px;margin:10px 0 4px}
.classes{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:12px;margin-top:16px}
.class{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 12px;min-width:0;
content-visibility:auto;contain-intrinsic-size:auto 130px}
.class header{display:flex;justify-content:space-between;gap:10px;margin-bottom:6px}.class header b{min-width:0}
.class header span{color:var(--quiet);font-size:.85rem;white-space:nowrap;font-variant-numeric:tabular-nums}
.sheet{display:grid;grid-template-columns:repeat(6,1fr);gap:3px;margin-top:9px}
.sheet i{display:block;aspect-ratio:1;border-radius:4px;background-repeat:no-repeat}
.pixels .sheet i,.pixels img{image-rendering:pixelated}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:12px}
.pair{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px;margin:0;min-width:0}
.pair>div{display:grid;grid-template-columns:1fr 1fr;gap:10px}.pair figure{margin:0;min-width:0}
.pair .frame{display:flex;align-items:center;justify-content:center;height:130px;border-radius:6px;
background:color-mix(in srgb,var(--line) 45%,transparent);overflow:hidden;color:var(--quiet);font-size:.85rem}
.pair img{max-width:100%;max-height:130px}.pair.small img{width:96px}
.pair figcaption{margin-top:6px;line-height:1.35}.pair p{margin:8px 0 0;font-size:.88rem}
.tag{display:inline-block;border-radius:4px;padding:0 6px;font-size:.78rem;color:#fff;background:var(--all)}
@media(prefers-color-scheme:dark){.tag{color:#14171d}}
.tag.train{background:var(--train)}.tag.validation{background:var(--validation)}.tag.test{background:var(--test)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,280px),1fr));gap:22px}
.chart{margin:0}.chart svg{width:100%;height:auto;overflow:visible}.chart rect{fill:var(--train)}
.chart line,.rule{stroke:var(--line);stroke-width:1.5}.chart text{fill:var(--quiet);font-size:11px}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:6px 36px}
.spread{width:100%;max-width:212px;height:16px}.spread line{stroke:var(--all);stroke-width:5;stroke-linecap:round}
.spread .rule{stroke:var(--line);stroke-width:2}.spread circle{fill:var(--all)}
.spread .red{stroke:#cf5b56;fill:#cf5b56}.spread .green{stroke:#4f9d5d;fill:#4f9d5d}
.spread .blue{stroke:#5280cc;fill:#5280cc}
.spread circle{stroke:var(--card)!important;stroke-width:2}
code{font:.86em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details{margin:.6em 0}summary{cursor:pointer}li{margin:.2em 0}
@media print{.class,.pair{break-inside:avoid;content-visibility:visible}body{background:#fff}}
@media(max-width:560px){.share{display:none}td,th{font-size:.86rem}.number{white-space:normal}
main{padding:20px 14px 48px}td,th{padding-right:7px}}
"""
