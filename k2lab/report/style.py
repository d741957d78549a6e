"""The page's style sheet and its one small script. No fonts, images or code from elsewhere."""

from __future__ import annotations

_LIGHT = """
--bg:#fbfbf9;--panel:#fff;--ink:#1b1e23;--soft:#555c66;--line:#e2e2dc;--rule:#cfcfc8;--tint:#f3f3ee;--accent:#1f58a8;
--good:#11693c;--bad:#b0261d;--warn:#8a5200;--warnbg:#fdf3e0;
--c0:#1f5fb4;--c1:#bf560b;--c2:#0d7a6f;--c3:#8640a3;--c4:#8f6500;--c5:#5b6472;--cq:#8b919a;
--h0:#2b5c9e;--h1:#6e97cb;--h2:#b9cde6;--h3:#eeede8;--h4:#f3cfa4;--h5:#e0953f;--h6:#a94f08;
"""

_DARK = """
--bg:#121418;--panel:#191c21;--ink:#e8e8e4;--soft:#a6adb7;--line:#2a2e36;--rule:#3b404a;--tint:#20242a;--accent:#86b4f5;
--good:#6fd39a;--bad:#ff948a;--warn:#f0bd6a;--warnbg:#2d2517;
--c0:#77acf6;--c1:#f0a062;--c2:#54c6b8;--c3:#cd98e6;--c4:#dbb456;--c5:#9aa5b3;--cq:#747c88;
--h0:#8cbcff;--h1:#4f83c6;--h2:#34507b;--h3:#2a2d33;--h4:#6a4924;--h5:#b7772f;--h6:#f7ae55;
"""

CSS = (
    f":root{{color-scheme:light dark;{_LIGHT}}}@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}".replace("\n", "")
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
Arial,"Liberation Sans",sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:break-word}
main,header,footer{max-width:1080px;margin:0 auto;padding:0 24px}
a{color:var(--accent)}
h1,h2,h3,h4{line-height:1.2;text-wrap:balance}
h1{font-size:40px;letter-spacing:-.022em;font-weight:680;margin:4px 0 18px}
h2{font-size:25px;letter-spacing:-.014em;font-weight:660;margin:0 0 6px}
h3{font-size:18px;font-weight:650;margin:34px 0 4px}
h4{font-size:15px;font-weight:650;margin:24px 0 6px}
code,pre,.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:.86em}
.over{font-size:13px;font-weight:600;letter-spacing:.02em;color:var(--soft);margin:0}
header{padding-top:52px}
.lead{font-size:22px;line-height:1.42;letter-spacing:-.008em;max-width:46em;margin:0 0 10px;text-wrap:pretty}
.more{font-size:17px;color:var(--soft);max-width:50em;margin:0 0 8px;text-wrap:pretty}
.banner{background:var(--warnbg);border-left:4px solid var(--warn);padding:12px 16px;margin:18px 0;border-radius:0 6px 6px 0}
.banner p{margin:0}.banner p+p{margin-top:4px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:0 28px;margin:26px 0 0;padding:0;border-top:1px solid var(--rule)}
.facts div{padding:13px 0 14px}
.facts dt{font-size:13px;color:var(--soft)}
.facts dd{margin:1px 0 0;font-size:19px;font-weight:600;line-height:1.3}
.facts small{display:block;font-size:13px;font-weight:400;color:var(--soft);line-height:1.45;margin-top:3px}
.flow{list-style:none;display:flex;flex-wrap:wrap;gap:8px 26px;margin:0;padding:16px 0;border-top:1px solid var(--rule);border-bottom:1px solid var(--rule)}
.flow li{position:relative;font-size:14px;line-height:1.35}
.flow li+li:before{content:"\\2192";position:absolute;left:-20px;color:var(--soft)}
.flow b{font-weight:620}.flow span{display:block;color:var(--soft);font-size:13px}
.flow .waiting b,.flow .unfinished b{color:var(--soft)}.flow .failed b{color:var(--bad)}
nav{display:flex;flex-wrap:wrap;gap:4px 20px;font-size:14px;margin:16px 0 0}
nav a{text-decoration:none}nav a:hover,nav a:focus{text-decoration:underline}
section{margin:64px 0 0;scroll-margin-top:16px}
.intro{color:var(--soft);max-width:48em;margin:0 0 18px}
.note,.chart-help,.fine{font-size:13px;color:var(--soft);line-height:1.45}
.note{margin:6px 0 0}
table{border-collapse:collapse;width:100%;font-size:15px}
th{font-weight:600;text-align:left;font-size:13px;color:var(--soft);vertical-align:bottom;padding:6px 12px 6px 0;border-bottom:1px solid var(--rule)}
td{padding:9px 12px 9px 0;border-bottom:1px solid var(--line);vertical-align:top}
th:last-child,td:last-child{padding-right:0}
.num{text-align:right;white-space:nowrap}
tbody th{color:var(--ink);font-size:15px;padding-top:9px;border-bottom:1px solid var(--line);vertical-align:top}
tr.group th{padding-top:24px;border-bottom:1px solid var(--rule);font-size:16px}
tr.group th span{font-weight:400;color:var(--soft);font-size:14px;margin-left:8px}
.unit{color:var(--soft);font-weight:400;font-size:.86em}
.better{color:var(--good);font-weight:640}.worse{color:var(--bad);font-weight:640}.unclear,.unknown{color:var(--soft)}
.verdict{display:block;font-size:13px;font-weight:500;white-space:nowrap}
.set{font-size:13px;color:var(--soft);line-height:1.4;min-width:130px}
.tip{position:relative;border-bottom:1px dotted var(--soft);cursor:help}
.tip:focus{outline:2px solid var(--accent);outline-offset:3px;border-radius:2px}
.tip i{position:absolute;left:0;top:calc(100% + 8px);z-index:5;width:min(320px,78vw);background:var(--ink);color:var(--bg);padding:10px 13px;border-radius:6px;
font:400 14px/1.45 inherit;font-family:inherit;font-style:normal;visibility:hidden;opacity:0;transition:opacity .12s;white-space:normal;text-align:left}
.tip:hover i,.tip:focus i{visibility:visible;opacity:1}
.plot{display:block;width:132px;height:26px}
.plot .w{stroke:var(--c0);stroke-width:2}.plot .a{fill:var(--c0)}.plot .b{fill:var(--panel);stroke:var(--soft);stroke-width:1.6}.plot .j{stroke:var(--rule);stroke-width:1.4}
.bars{display:grid;grid-template-columns:minmax(110px,max-content) 1fr;gap:7px 14px;align-items:center;margin:8px 0 6px;font-size:15px}
.bars .who small{display:block;color:var(--soft);font-size:13px;line-height:1.3}
.bar{position:relative;height:22px;margin-right:128px}
.bar b{display:block;height:100%;border-radius:0 3px 3px 0;background:var(--c0);min-width:2px}
.bar.base b{background:var(--cq)}.bar.mem b{background:var(--c2)}
.bar em{position:absolute;top:0;line-height:22px;margin-left:9px;font-style:normal;white-space:nowrap;font-size:14px;font-weight:600}
.bar em span{font-weight:400;color:var(--soft)}
.bar u{position:absolute;top:10px;height:2px;background:var(--ink);opacity:.75}
.bar u:before,.bar u:after{content:"";position:absolute;top:-4px;width:2px;height:10px;background:var(--ink)}.bar u:after{right:0}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:26px 36px;margin-top:14px}
.chart{margin:0;min-width:0;break-inside:avoid}
.chart figcaption{font-weight:640;font-size:15px}
.chart-help{margin:2px 0 6px;min-height:2.9em}
.chart svg{display:block;width:100%;height:auto;overflow:visible;touch-action:pan-y}
svg text{fill:var(--soft);font-size:12px;font-family:inherit}
.lab{paint-order:stroke;stroke:var(--bg);stroke-width:3px;stroke-linejoin:round}
.grid{stroke:var(--line)}.axis{stroke:var(--rule)}
.level{stroke:var(--bad);stroke-dasharray:6 4;stroke-width:1.4}.moment{stroke:var(--soft);stroke-dasharray:2 3}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}.quiet{stroke-width:1.1;opacity:.8}.band{opacity:.2;stroke:none}
.event{stroke:var(--bad);stroke-width:1.6}
"""
    + "".join(
        f".line.{c}{{stroke:var(--{c})}}.band.{c},circle.{c}{{fill:var(--{c})}}.key.{c}{{color:var(--{c})}}"
        for c in ("c0", "c1", "c2", "c3", "c4", "c5", "cq")
    )
    + "".join(f"path.h{i}{{fill:var(--h{i})}}.key.h{i}{{color:var(--h{i})}}" for i in range(7))
    + """
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;color:var(--soft);margin:6px 0 0}
.legend span{display:inline-flex;align-items:center;gap:6px}
.key{display:inline-block;width:16px;height:0;border-top:3px solid currentColor}
.key.dot{width:8px;height:8px;border:0;border-radius:50%;background:currentColor}.key.area{height:10px;border:0;background:currentColor;opacity:.3}
.key.box{width:14px;height:12px;border:0;background:currentColor;outline:1px solid var(--line)}.key.bar{width:2px;height:9px;border:0;background:var(--bad)}
#read{position:fixed;z-index:9;pointer-events:none;background:var(--ink);color:var(--bg);font-size:13px;line-height:1.4;padding:7px 10px;border-radius:6px;visibility:hidden;max-width:280px}
#read b{display:block;font-weight:600}#read i{display:inline-block;width:8px;height:8px;border-radius:50%;margin-right:6px;border:1px solid var(--bg)}
.hair{stroke:var(--soft);stroke-width:1;visibility:hidden}
.prompt{margin:26px 0 8px;font-size:15px}
.prompt b{font-weight:600;color:var(--soft);font-size:13px;display:block}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;line-height:1.5;unicode-bidi:isolate}
.says{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(260px,100%),1fr));gap:12px}
.say{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:12px 14px;min-width:0;break-inside:avoid}
.say header{all:unset;display:flex;justify-content:space-between;gap:10px;font-size:13px;margin-bottom:7px}
.say header b{font-weight:640}.say header span{color:var(--soft);white-space:nowrap}.say header .cut{color:var(--warn)}
.say .none{color:var(--soft);font-style:italic}
.split{display:flex;height:12px;border-radius:3px;overflow:hidden;background:var(--line);min-width:120px;margin-top:6px}
.split b{background:var(--c0)}.split i{background:var(--c4)}.split u{background:var(--c1)}
details{border-top:1px solid var(--line);padding:10px 0}
details summary{cursor:pointer;font-weight:600}
details summary:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
details pre{background:var(--tint);border-radius:8px;padding:14px 16px;margin:10px 0;max-height:520px;overflow:auto}
td details{border:0;padding:2px 0 0}td details summary{font-weight:400;font-size:13px;color:var(--accent)}
.ex{margin:8px 0;padding:8px 12px;background:var(--tint);border-radius:6px}.ex p{margin:0 0 3px;font-size:13px;color:var(--soft)}
.scroll{overflow-x:auto;margin:10px 0}.scroll:focus-visible{outline:2px solid var(--accent)}
.dag{display:block}.dag .box{fill:var(--panel);stroke:var(--rule);stroke-width:1.3}.dag .open{stroke-dasharray:5 4}.dag .outside{fill:var(--tint)}
.dag .name{fill:var(--ink);font-size:15px;font-weight:640}.dag .sub{font-size:12.5px}
.dag .edge{fill:none;stroke:var(--cq);stroke-width:1.5}.dag .head{fill:var(--cq)}
dl.words{display:grid;grid-template-columns:minmax(120px,max-content) 1fr;gap:6px 20px;margin:10px 0;font-size:15px}
dl.words dt{font-weight:600}dl.words dd{margin:0;color:var(--soft)}
footer{margin-top:72px;padding-top:22px;padding-bottom:72px}
footer>div{border-top:1px solid var(--rule);padding-top:22px}
footer li{margin:4px 0}footer ul{padding-left:20px}
.cmd{background:var(--tint);border-radius:8px;padding:12px 16px;margin:8px 0}
@media(max-width:720px){
body{font-size:16px}main,header,footer{padding-left:16px;padding-right:16px}header{padding-top:28px}
h1{font-size:31px}h2{font-size:22px}.lead{font-size:19px}.more{font-size:16px}section{margin-top:48px}
.facts{grid-template-columns:1fr 1fr;gap:0 18px}.facts dd{font-size:17px}
table.cards thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
table.cards,table.cards tbody,table.cards tr,table.cards td,table.cards th{display:block;width:100%;text-align:left;white-space:normal}
table.cards tr{padding:10px 0;border-bottom:1px solid var(--line)}table.cards tr.group{border-bottom:1px solid var(--rule);padding-bottom:4px}
table.cards td,table.cards tbody th{border:0;padding:2px 0}
table.cards td[data-h]{display:grid;grid-template-columns:112px 1fr;gap:10px}
table.cards td[data-h]:before{content:attr(data-h);color:var(--soft);font-size:13px;padding-top:2px}
table.cards .empty{display:none}.plot{display:none}table.cards .set{min-width:0}
.chart-help{min-height:0}.bars{grid-template-columns:1fr;gap:2px}.bars .who{margin-top:10px}.bars .who small{display:inline;margin-left:6px}
svg text{font-size:14px}.dag text,.dag .sub{font-size:12.5px}.dag .name{font-size:15px}dl.words{grid-template-columns:1fr;gap:2px}dl.words dd{margin-bottom:8px}
}
@media print{
@page{margin:14mm}body{font-size:11pt;background:#fff}nav,#read,.tip i{display:none}.tip{border:0}
main,header,footer{max-width:none;padding:0}section{margin-top:30px}h1{font-size:26pt}.lead{font-size:14pt}
h2,h3,h4{break-after:avoid}tr,.say,.ex,.bars{break-inside:avoid}details pre{max-height:none}.scroll{overflow:visible}.dag{max-width:100%;height:auto}
.grid2{grid-template-columns:1fr 1fr;gap:16px 24px}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}.tip i{transition:none}}
"""
)

# Read-out under the pointer on line charts, and <details> opened for printing. The page is complete without it.
SCRIPT = """
(function(){
var d=document,r=d.createElement('div');r.id='read';r.setAttribute('aria-hidden','true');d.body.appendChild(r);
d.querySelectorAll('svg[data-x]').forEach(function(s){
var b=s.dataset.b.split(',').map(Number),xs=s.dataset.x.split(',').map(Number);
var ls=s.dataset.s.split('|').map(function(t){var p=t.split('~');return{n:p[0],c:p[1],v:p[2].split(',')}});
var t=s.querySelector('title');if(t){s.setAttribute('aria-label',t.textContent);s.removeAttribute('aria-labelledby');
s.setAttribute('aria-describedby',s.querySelector('desc').id);t.remove()}
var h=d.createElementNS('http://www.w3.org/2000/svg','line');h.setAttribute('class','hair');h.setAttribute('y1',10);h.setAttribute('y2',196);s.appendChild(h);
function hide(){r.style.visibility='hidden';h.style.visibility='hidden'}
s.addEventListener('pointerleave',hide);
s.addEventListener('pointermove',function(e){
var q=s.getBoundingClientRect(),u=(e.clientX-q.left)/q.width*480;
if(u<b[0]-8||u>b[1]+8)return hide();
var x=b[2]+(u-b[0])/(b[1]-b[0])*(b[3]-b[2]),k=0;
xs.forEach(function(v,i){if(Math.abs(v-x)<Math.abs(xs[k]-x))k=i});
var px=b[0]+(xs[k]-b[2])/(b[3]-b[2])*(b[1]-b[0]);h.setAttribute('x1',px);h.setAttribute('x2',px);h.style.visibility='visible';
r.textContent='';var m=d.createElement('b');m.textContent=s.dataset.n+' '+xs[k];r.appendChild(m);
ls.forEach(function(l){if(!l.v[k])return;var p=d.createElement('div'),i=d.createElement('i');i.style.background='var(--'+l.c+')';
p.appendChild(i);p.appendChild(d.createTextNode(l.n+'  '+l.v[k]));r.appendChild(p)});
r.style.visibility='visible';
var w=r.offsetWidth,x0=e.clientX+14;if(x0+w>innerWidth-8)x0=e.clientX-w-14;
r.style.left=Math.max(4,x0)+'px';r.style.top=Math.max(4,Math.min(e.clientY+12,innerHeight-r.offsetHeight-8))+'px'})});
var o=[];addEventListener('beforeprint',function(){o=[].slice.call(d.querySelectorAll('details:not([open])'));o.forEach(function(e){e.open=true})});
addEventListener('afterprint',function(){o.forEach(function(e){e.open=false})});
})();
"""
