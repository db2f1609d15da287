"""The look of what only the certificate's page has: classes with their sheets, pairs of copies, charts of images."""

from pipeline.pages.style import style

STYLE = style(
    """.train{background:var(--train);fill:var(--train)}\
.validation{background:var(--validation);fill:var(--validation)}
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
"""
)
