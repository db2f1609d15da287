"""The look of what only a report has: curves, scores with intervals, pictures, blocks to copy."""

from pipeline.pages.style import style

STYLE = style(
    """
.scroll{overflow-x:auto;margin:.6em 0 1em;
background:linear-gradient(to left,var(--paper) 30%,transparent) 100% 0/36px 100% no-repeat local,
linear-gradient(to left,var(--line),transparent) 100% 0/12px 100% no-repeat scroll}
.scroll table{width:auto;min-width:100%}
.scroll td:first-child,.scroll th:first-child{position:sticky;left:0;background:var(--paper)}
.scroll .wrap{white-space:normal;display:inline-block;min-width:16em}
.scroll td,.scroll th{white-space:nowrap;padding-right:14px;font-size:.92rem}
.facts td,.wrap{overflow-wrap:anywhere}.facts{margin:.6em 0 1em}.facts th{width:13em;min-width:8em;font-weight:500}
pre{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;overflow-x:auto;
margin:.6em 0;line-height:1.45}pre code{overflow-wrap:normal;white-space:pre}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,310px),1fr));gap:18px 26px;margin:1em 0}
.curve{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 12px;min-width:0}
.curve figcaption{color:var(--ink)}.curve svg{width:100%;height:auto;display:block;margin-top:6px}
.curve .line{fill:none;stroke-width:1.8;stroke-linejoin:round}.curve .spread-of{stroke:none;opacity:.2}
.curve .line.one{stroke:var(--train)}.curve .line.two{stroke:var(--test)}
.curve circle.one,.curve .spread-of.one{fill:var(--train)}
.curve circle.two,.curve .spread-of.two{fill:var(--test)}
.curve .band{fill:var(--good);opacity:.2}.curve svg line{stroke:var(--line)}
.curve svg text{fill:var(--quiet);font-size:10.5px}.curve .legend{margin:.3em 0 0;color:var(--quiet)}
.legend span{display:inline-block;margin-right:16px;font-size:.88rem}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.legend i.one{background:var(--train)}.legend i.two{background:var(--test)}
.legend i.expected{background:var(--good);opacity:.45}
.mark{border-radius:4px;padding:0 7px;font-size:.85rem;font-weight:600}
.mark.good{background:var(--good-back);color:var(--good)}.mark.bad{background:var(--look-back);color:var(--look)}
.scores{margin:.4em 0 1.2em}.scores caption{text-align:left;font-weight:600;padding:4px 0}
.scores th{font-weight:500;font-size:.92rem;color:var(--ink)}.scores .plot{width:46%;padding-top:11px}
.scores .number span{display:inline-block;white-space:nowrap}
.range{position:relative;height:10px;margin:0 8px}
.range i{position:absolute;top:4px;height:3px;border-radius:2px;opacity:.75}
.range b{position:absolute;top:0;width:11px;height:11px;border-radius:50%;margin-left:-5.5px}
.range.one i,.range.one b{background:var(--train)}.range.two i,.range.two b{background:var(--test)}
.range.base i,.range.base b{background:var(--all)}
.pictures{columns:2 400px;column-gap:18px;margin-top:1em}.pictures .picture{break-inside:avoid;margin:0 0 18px}
.picture{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px;min-width:0}
.picture img{display:block;max-width:100%;height:auto;margin:0 auto;background:#fff}
.picture.pixels img{width:min(100%,420px);image-rendering:pixelated}
.picture figcaption{margin-top:8px;line-height:1.4}.picture figcaption b{color:var(--ink)}
nav{font-size:.9rem;margin:1em 0 0}nav a{color:var(--train);margin-right:14px;display:inline-block}
a:focus-visible,[tabindex]:focus-visible,summary:focus-visible{outline:2px solid var(--train);outline-offset:2px}
@media print{.curve,.picture,.scores{break-inside:avoid}nav{display:none}.scroll,pre{overflow:visible}
pre code{white-space:pre-wrap;overflow-wrap:anywhere}}
@media(max-width:560px){.facts table,.facts tbody,.facts tr,.facts td,.facts th{display:block;width:auto}
.facts th{border:0;padding-bottom:0}.scores .plot{width:34%}.tile b{font-size:1.15rem}
.scroll td,.scroll th{padding-right:10px}.scroll .wrap{min-width:9em}
.scroll td:first-child{white-space:normal;overflow-wrap:break-word;min-width:6.5em}}
"""
)
