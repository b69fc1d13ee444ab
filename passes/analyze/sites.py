"""temporary"""
from __future__ import annotations
import torch
from mpq_fx.facts import Site
from mpq_fx.graph import value, source_line, placeholders
aten=torch.ops.aten
def find_sites(gm, parameters):
    out=[]
    for n in gm.graph.nodes:
        if n.target is aten.linear.default:
            w=n.args[1]; v=value(n.args[0]); 
            name=parameters[w.name].rsplit('.',1)[0]
            import math
            macs=math.prod(int(s) for s in v.shape)*value(w).shape[0]
            out.append(Site(name,'linear',n.name,w.name,None,tuple(v.shape),tuple(value(w).shape),tuple(value(n).shape),(),'float32',macs,None,name,source_line(n)))
    return out
