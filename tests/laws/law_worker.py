"""One rank of a gloo group, started by the law tests: a step's gradients of lm and of the objectives named, then ten MuonClip
steps of lm; saves what it saw."""

import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from laws_fixture import feed_of, model_of, one_backward, train_steps

from k2lab.core.slots import load
from k2lab.dist import mesh


def main() -> None:
    name, out = sys.argv[1], sys.argv[2]
    torch.set_num_threads(1)
    rank, world, _ = mesh.init("cpu")
    dtype = torch.float64 if "64" in out else torch.float32
    model = model_of(name, dtype)
    model.capture_max_logits(100.0)
    share = 4 // world
    sums, metrics, grads, tokens = one_backward(model, feed_of(share, rank, world))
    result = {"sums": sums, "grads": grads, "tokens": torch.from_numpy(tokens), "counts": metrics.expert_counts}
    result["logits"] = metrics.max_logits
    for kind in sys.argv[3:]:
        objective = load("objective", kind).examples()[-1]
        sums, _, grads, tokens = one_backward(model_of(name, dtype), feed_of(share, rank, world, objective), objective)
        result[kind] = {"sums": sums, "grads": grads, "tokens": torch.from_numpy(tokens)}
    if dtype == torch.float32:
        trained = model_of(name)
        result["losses"] = train_steps(trained, feed_of(share, rank, world), 10)
        result["weights"] = {n: t.clone() for n, t in trained.state().items()}
    torch.save(result, f"{out}.{rank}")
    mesh.barrier()
    mesh.close()


if __name__ == "__main__":
    main()
