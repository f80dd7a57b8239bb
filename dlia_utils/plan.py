"""What a run will cost: its phases as counted passes of images, and the time that these take.

Counts come from numbers alone. A pass is priced by a few batches of the real network here, or by
its multiplications and the published speed of a Tesla T4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .device import release_memory
from .models.pixel import fast_copy
from .objectives import PASSES

# Of one Tesla T4: multiplications a second in float32 and in half precision, and how many times its
# three passes a step of training costs. What is not named here is scaled by multiplications.
# dense: ResNet-50, 4.09e9 at 224 px: 428 images/s (batch 64), in mixed precision 1,190 (batch 128):
#   NVIDIA DeepLearningExamples, PyTorch, resnet50v1.5. Faster R-CNN v2 at 640 px in float32 agrees:
#   15,000 images in an hour (sovit-123/fasterrcnn-pytorch-training-pipeline, issue 88)
# wide: WRN-28-10, 5.25e9 at 32 px, batch 128: ten epochs of CIFAR-10 in 57:17 minutes, in mixed
#   precision 31:14 (blog.ceshine.net/post/apex-t4-p100)
# depthwise: MobileNetV2, 0.30e9 at 224 px: 1,419, 2,760 images/s (Paddle Inference 2.3, TensorRT,
#   batch 4). EfficientNet-B0, its like, trains 4.6 times slower than it answers, not 3 (on a V100:
#   655 and 2,968 images/s, in half precision 1,301 and 6,176; DeepLearningExamples)
T4 = {"dense": (1.75e12, 4.87e12, 1.0), "wide": (2.44e12, 4.47e12, 1.0)}
T4["depthwise"] = (0.425e12, 0.83e12, 1.55)
SECOND_ORDER = ("lipschitz", "margin_gradient")  # these are trained in float32
ON_CPU = 8  # images of a batch that is timed on a CPU, at most


@dataclass(frozen=True)
class Network:
    """A network to be priced: `build()` makes it, for images [B,1,size,size], `batch` at a time.

    kind: "dense", "wide" or "depthwise", a row of `T4`; "": as its convolutions say.
    """

    build: Callable[[], nn.Module]
    size: int
    batch: int = 32
    kind: str = ""

    def example(self, device: str, batch: int) -> tuple[nn.Module, Tensor]:
        with torch.device(device):
            return self.build().eval(), torch.rand(batch, 1, self.size, self.size)


@dataclass(frozen=True)
class Phase:
    """Image-passes through one network; those of a `name` are a line of the table.

    The jobs of a `name` lie side by side on several GPUs, those of no name one after the other.
    """

    name: str
    network: str
    images: int
    forwards: int
    backwards: int = 0
    updates: int = 0  # of the backwards those that go on to the weights
    loads: int = 0  # images read and augmented
    exact: bool = True  # else the most there can be
    half: bool = False  # in half precision on a GPU
    settings: str = ""  # what drives it
    job: str = ""


def training(name, network, n, epochs, *, objective, steps=0, replays=1, batch=32, **about):
    """The phases of a `train.fit` on n images: learning, and judging its epochs.

    steps: of the attack inside; about: val, images to validate; judge, the most passes (forward,
    backward) of `val_metric` in an epoch; fields of `Phase` (exact=False: it may end sooner).

    >>> found = training("a", "net", 65, 2, objective="trades", steps=7, val=10)
    >>> [(one.images, one.forwards, one.backwards, one.exact) for one in found]
    [(65, 1280, 1152, True), (10, 20, 0, True)]
    """
    about = dict(val=0, judge=(0, 0), exact=True) | about
    val, judge = about.pop("val"), about.pop("judge")
    seen = replays * epochs * (n - (batch > 1 and n % batch == 1))  # no batch of one image
    forward, backward, update = PASSES[objective]
    counts = [seen * one for one in (forward + steps, backward + steps, update)] + [seen // replays]
    learn = Phase(name, network, n, *counts, half=objective not in SECOND_ORDER, **about)
    about["exact"] &= not any(judge)
    counts = epochs * (val + int(judge[0])), epochs * int(judge[1])
    return [learn, Phase("choice of the epoch", network, val, *counts, **about)]


def multiplications(network: Network) -> tuple[float, str]:
    """Of a forward pass of one image, counted on shapes alone; and the network's kind.

    >>> multiplications(Network(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), 18))
    (55296.0, 'dense')
    """
    model, x = network.example("meta", 1)
    net, x = getattr(model, "rcnn", getattr(model, "backbone", model)), x.expand(-1, 3, -1, -1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if hasattr(model, "rcnn"):  # how many boxes go on is not known before: all that may
            net.rpn.head([*net.backbone(x).values()])
            shape = net.rpn.post_nms_top_n(), net.backbone.out_channels, 7, 7
            net.roi_heads.box_predictor(net.roi_heads.box_head(x.new_zeros(shape)))
        else:
            net(x)
    grouped = any(getattr(part, "groups", 1) > 1 for part in net.modules())
    return counter.get_total_flops() / 2, network.kind or ("depthwise" if grouped else "dense")


def published(networks: Mapping[str, Network]) -> dict[tuple[str, bool], np.ndarray]:
    """Seconds an image on a T4: a forward pass, a backward pass to the image, one to all weights.

    By the network's name and whether in half precision. The last, of reading, is 0: not known.
    """
    found = {}
    for name, network in networks.items():
        work, kind = multiplications(network)
        *speeds, slower = T4[kind]
        once = work * np.array([1, 1, 3 * slower - 1, 0])
        found |= {(name, bool(half)): once / speed for half, speed in enumerate(speeds)}
    return found


def measured(networks: Mapping[str, Network], device: str, loader, *, seconds=20.0) -> dict:
    """As `published`, but of this machine: a few batches of random images, small networks first.

    loader: a data set, whose images are read for their price. What `seconds` leave no time for is
    scaled from another, and so are others of a named kind.
    """
    work, found, done = {name: multiplications(networks[name])[0] for name in networks}, {}, []
    end, some = time.perf_counter() + seconds, [k % len(loader) for k in range(ON_CPU)]
    read = getattr(loader, "__getitems__", lambda some: [loader[k] for k in some])
    load = _seconds(lambda: read(some), device) / ON_CPU
    for name in sorted(work, key=work.get):
        own, most = networks[name], ON_CPU if device == "cpu" else networks[name].batch
        alike = [other for other in done if own.kind and networks[other].kind == own.kind]
        for half in (False, True)[: 1 + (device != "cpu")]:
            near, batch = (alike or done or [name])[-1], max(2, min(own.batch, most))
            price = found.get((near, half), np.zeros(4)) * work[name] / work[near]
            late = time.perf_counter() + 4 * batch * price @ [3, 1, 1, 0] > end  # `_measured`
            if not done or not (alike or late):
                with torch.random.fork_rng(devices=[]):  # of dropout
                    price = _measured(own, device, half, batch)
            price[3] = load
            found |= {(name, half): price, (name, True): price}
        done.append(name)
    release_memory()
    return found


def _seconds(step: Callable[[], object], device: str) -> float:
    """What a step takes: the mean of two, after a first, which is slower."""
    finish = int if device == "cpu" else torch.cuda.synchronize
    step(), finish()
    begun = time.perf_counter()
    step(), step(), finish()
    return (time.perf_counter() - begun) / 2


def _measured(network: Network, device: str, half: bool, batch: int) -> np.ndarray:
    model, x = network.example(device, batch)  # two images at least, for the batch norms
    model, x = model.to(memory_format=torch.channels_last), x.requires_grad_()

    def seconds(step: Callable[[], object]) -> float:
        with torch.autocast(device, enabled=half):
            return _seconds(step, device) / batch

    asked = model if half or hasattr(model, "rcnn") else fast_copy(model)  # as the attacks do
    forward = seconds(torch.no_grad()(lambda: asked(x)))
    if hasattr(model, "rcnn"):  # learns from boxes: three passes as usual
        return forward * np.array([1, 1, 2, 0])
    climb = seconds(lambda: torch.autograd.grad(asked(x).float().sum(), x))
    learn = seconds(lambda: model.train()(x).float().sum().backward())
    return np.array([forward, climb - forward, learn - forward, 0])


def table(networks: Mapping[str, Network], phases: list[Phase], prices: Mapping, *, gpus=1):
    """A row for each name of the phases, with its hours on so many GPUs, and one "in all".

    images: the most of a job; forwards, backwards: image-passes of all; count: exact, or at most.
    """
    rows = pd.DataFrame(phases)
    rows["network"] = [f"{name}, {networks[name].size} px" for name in rows["network"]]
    counts = rows[["forwards", "backwards", "updates", "loads"]].to_numpy(copy=True)
    counts[:, 1] -= counts[:, 2]  # the others go to the image alone
    price = [prices[one.network, one.half] for one in phases]
    rows["hours"] = (counts * price).sum(1) / 3600
    how = dict(network=lambda names: names.iloc[0] + " and others" * (names.nunique() > 1))
    how |= dict(images="max", forwards="sum", backwards="sum", exact="all", settings="first")
    found = rows.groupby("name", sort=False).agg(how)
    jobs = rows.groupby(["name", "job"])["hours"].sum().groupby("name")
    found["hours"] = jobs.agg(_longest, gpus=gpus)
    found.loc["in all"] = found.agg(how | dict(hours="sum", settings="min"))
    found.loc["in all", ["network", "settings"]] = ""
    found["exact"] = np.where(found["exact"], "exact", "at most")
    return found.rename_axis("phase").rename(columns={"exact": "count"})


def _longest(hours: Iterable[float], gpus: int) -> float:
    """How long the longest of so many lanes is, where the longest jobs are begun first."""
    lanes = [0.0] * gpus
    for one in sorted(hours, reverse=True):
        lanes[lanes.index(min(lanes))] += one
    return max(lanes)


def advice(found: pd.DataFrame, hours: float | None) -> str:
    """What a `table` says of a budget: whether it is met, else where most can be cut."""
    whole = found["hours"].iloc[-1]
    told = f"{whole:.1f} hours" if whole >= 1 else f"{max(1, round(60 * whole))} min"
    if not hours or whole <= hours:
        return f"{told}, within the budget of {hours:g}" if hours else told
    largest = found.iloc[:-1].nlargest(3, "hours").itertuples()
    cut = [f"{one.settings} ({one.Index}: {one.hours:.1f} h)" for one in largest]
    return f"{told}, over the budget of {hours:g}; cut first {'; '.join(cut)}"
