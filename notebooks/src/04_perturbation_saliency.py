# %% [markdown]
# # 04 Does a heat map that moves warn of a wrong answer?
#
# Add a little noise to a chest radiograph and the heat map that "explains" the network's answer moves. Often the answer stays.
# It is tempting to read the movement, the *drift* of the map, as a warning: the explanation is unstable, so do not trust
# the answer. **Does saliency drift predict failure under noise, blur and loss of contrast?** This notebook puts the
# question first, and answers it image by image, with a number and an interval.
#
# It repeats a Master's thesis: Pierre Treyer, *Interpretability-based robustness analysis of medical image classification
# models* ([code](https://github.com/cailloumagic/MedMNIST)), from here on "the thesis". It measured how far maps move and
# how much accuracy falls, and drew one against the other; whether one foretells the other it did not compute.
#
# **What you will learn.**
#
# - to corrupt radiographs in five severities so that nothing but the corruption differs;
# - to sum up what corruptions cost in one number, the mean corruption error (mCE), and what training on them buys;
# - to measure how far a heat map moves, between a floor (no change) and a ceiling (another patient's map);
# - to test a warning fairly: image by image, at equal severity, against rivals that cost nothing;
# - to see through a correlation that a third quantity, here severity, makes.
#
# **Before you start.** You need Python with NumPy and pandas, a first acquaintance with PyTorch (tensors, a training loop),
# and what an AUC is: the area under the ROC (receiver operating characteristic) curve, 0.5 for a coin, 1 for perfect
# ranking. [Notebook 01](01_pneumonia_robustness.ipynb) introduces the data set; Grad-CAM is taken apart in
# [notebook 07](07_covid_transfer_gradcam.ipynb), here it is used.
#
# **Time.** `smoke`, on a laptop, three to five minutes; `cpu`, a laptop with real images, about two hours; `full` needs a GPU
# (graphics card): about an hour of Kaggle's two T4, by the plan below (not seen yet).
#
# <!-- contents -->
#
# What came out on hospital images stands in section 8. The outputs stored in this file are from the smoke profile on
# *synthetic* images with tiny networks: they show what you will see, not what is true.
#
# *For research and teaching. Not a medical device.*

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"  # "smoke" (minutes), "cpu" (a laptop, about two hours), "full" (GPU), or "auto"
DATA_DIR = ""  # empty: find it; else the folder that holds it, or your own: one of class folders
RUN_NAME = ""  # empty: profile and kind of data
RESUME = True  # True: go on where a run stopped; False: anew; "force": under other settings
CHANGES = {}  # settings of your own, such as {"dataset": "covid"} or {"epochs": 5}

# %% [markdown]
# **The settings.** FULL is the whole study; CPU and SMOKE are what is smaller on a laptop and in a first look. To change
# one, whatever the profile, write it into `CHANGES` above: `CHANGES = {"epochs": 5}`. A typo is told, a changed setting
# is starred below, and the run gets a folder of its own, which takes over whatever the change does not touch.
#
# **Your own images**: `DATA_DIR` may be any folder with a folder of images for each class (below `train`, `val` and
# `test` if you have a split). A CSV in it with the columns `file` and, as you have them, `label`, `patient`, `split`
# says more. Without patients every image counts as one: `patient_pattern` reads them from the file names.

# %% tags=["settings"]
# The data; size is that of the CIFAR-style ResNet-18, whose maps end at an eighth of it
FULL = {"dataset": "pneumonia", "seed": 0, "size": 128, "fit": "squash", "per_class": None}
FULL |= {"val_share": 0.15, "test_share": None, "unusable_share": 0.0}
FULL |= {"classes": None, "patient_pattern": ""}
# The two networks: the ResNet from scratch, as in the thesis; MobileNetV2 from ImageNet weights
FULL |= {"width": 1.0, "mobilenet_size": 224, "mobilenet_width": 1.0, "stages": 7}
FULL |= {"pretrained": True}
# The recipe; a monitor chooses the best epoch; max_minutes is for one model, None is no limit
FULL |= {"epochs": 30, "mobilenet_epochs": 15, "batch_size": 64, "lr": 1e-3, "schedule": "onecycle"}
FULL |= {"monitor": "val_auc", "mobilenet_monitor": "val_auc"}
FULL |= {"patience": None, "max_minutes": 120.0, "num_workers": 2}
FULL |= {"hours": None}  # of a session; None is 11 of Kaggle's 12, and no limit elsewhere

# %% tags=["settings"]
# The corruptions: seen by the augmented trainings; measured; those whose maps are compared
THESIS = ("gaussian_noise", "speckle_noise", "motion_blur", "contrast", "brightness")
RADIOGRAPHS = ("shot_noise", "poisson_dose", "scatter_veil", "collimation", "marker", "grid_lines")
FULL |= {"scale": "imagenet-c", "trained_on": THESIS, "severities": (1, 2, 3, 4, 5)}
FULL |= {"corruptions": THESIS + RADIOGRAPHS + ("resampling", "bit_depth", "jpeg")}
FULL |= {"mapped": THESIS + ("poisson_dose", "scatter_veil", "collimation")}
# Validation images that choose the score, test images that judge it (None: all), and resamplings
FULL |= {"choose_images": 200, "map_images": None, "map_batch": 32, "bootstrap_draws": 2000}

# %% tags=["settings"]
# A laptop
CPU = {"size": 64, "width": 0.5, "mobilenet_size": 112, "epochs": 8, "mobilenet_epochs": 5}
CPU |= {"batch_size": 32, "num_workers": 0}
CPU |= {"mapped": THESIS + ("poisson_dose",), "choose_images": 150}

# %% tags=["settings"]
# A first look: few synthetic images, small networks (width: with 1/8 torch crashes on some CPUs)
SMOKE = {"size": 48, "per_class": 96, "width": 0.1875, "mobilenet_size": 48, "mobilenet_width": 0.5}
SMOKE |= {"stages": 3, "pretrained": "phantom", "epochs": 12, "mobilenet_epochs": 12}
SMOKE |= {"batch_size": 16, "lr": 3e-3, "num_workers": 0, "max_minutes": None}
# On 32 validation images the AUC of a pretrained network soon is 1 and stays: the loss chooses
SMOKE |= {"mobilenet_monitor": "val_loss"}
SMOKE |= {"corruptions": THESIS + ("poisson_dose", "collimation"), "mapped": THESIS}
SMOKE |= {"severities": (1, 3, 5), "choose_images": 16, "map_images": 24, "bootstrap_draws": 200}
# Any other data: a test split is drawn where there is none
OTHER = {"test_share": 0.15, "unusable_share": 0.01}
# A set of MedMNIST that is named without a size has 28 px: a study does not enlarge them
if str(CHANGES.get("dataset")).partition("-")[0].endswith("mnist"):
    FULL["size"] = CPU["size"] = 28

# %% tags=["start"]
from dlia_utils.run import start

run = start(
    "04_perturbation_saliency",
    dict(full=FULL, cpu=CPU, smoke=SMOKE),
    dict(profile=PROFILE, data_dir=DATA_DIR, run_name=RUN_NAME, resume=RESUME, changes=CHANGES),
    by_data={"pneumonia": {}, "*": OTHER},
    allowed={name: FULL["corruptions"] for name in ("corruptions", "mapped", "trained_on")}
    | {"pretrained": ("phantom",)},
    own_data="any",
    trains="3 Training, with and without corrupted images",
)
print(run)

# %% tags=["imports"]
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
import pandas as pd
import psutil
import torch
from IPython.display import Markdown, display
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from dlia_utils import corrupt, corruption_error, files, metrics, models, objectives, plan, plots
from dlia_utils import report
from dlia_utils import study as studies
from dlia_utils.data import augment, datasets, split
from dlia_utils.explain import drift, figures, warning
from dlia_utils.study import load_models, made_by, open_study, stored, test_opened

RESULTS = run.run_dir / "results.csv"

# %% [markdown]
# **Your model here.** One line puts any convolutional network with a logit a class into every table and figure below: a
# function that *builds* one is trained twice, plainly and on corrupted images; a network that is *trained already* is taken
# as it is, and stands for both. `models.wrap` puts its normalisation inside, so that images enter in [0, 1].

# %% tags=["yours"]
# run.own["resnet34"] = lambda: models.backbone("resnet34", num_classes=2)
# run.own["mine"] = models.wrap(my_network, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
PLAIN = ("resnet18", "mobilenet_v2", *run.own)
PAIRS = {name: f"{name}_augmented" for name in PLAIN}  # trained plainly, and on corrupted images
run.own.update({PAIRS[name]: own for name, own in list(run.own.items()) if name in PAIRS})
MODELS = [name for pair in PAIRS.items() for name in pair]


# %% [markdown]
# **What the sections share.** The two networks read images of different sizes. Predictions and maps are computed once and kept
# in the run folder; time and memory of each step go into `resources.csv`.

# %% tags=["yours"]
def study_of(name, study):
    """The study as this network reads it; images, rows and split are the same."""
    if not name.startswith("mobilenet_v2"):
        return study
    own = {key: run.settings[f"mobilenet_{key}"] for key in ("size", "width", "epochs", "monitor")}
    return study.variant(**own)


# %% tags=["yours"]
@contextmanager
def tracked(label):
    """Time and memory of a step: one more line of resources.csv in the run folder."""
    wall, cpu, path = time.perf_counter(), time.process_time(), run.run_dir / "resources.csv"
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    yield
    row = {"step": label, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    row["memory_mib"] = psutil.Process().memory_info().rss / 2**20
    row["gpu_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20 if gpu else np.nan
    pd.DataFrame([row]).round(1).to_csv(path, mode="a", header=not path.exists(), index=False)


# %% tags=["yours"]
USES = {"test": ["corruptions"], "maps_test": ["mapped", "map_images"]}
USES |= {"maps_val": ["mapped", "choose_images"]}


def measured(name, study, part, rows, **options):
    """Predictions (and drift of maps) of the images `rows`, clean and corrupted, once in a run."""
    own, grid, found = study_of(name, study), ["severities", "seed", "scale"], []

    def table(number):
        if not found:  # one pass makes both tables
            model, images = load_models(study, [name])[name], own.images(rows)
            options.update(run.pick(*grid), batch_size=run.map_batch)
            with tracked(f"{part} {name}"):
                seen, moved = drift.measure(model, images, own.labels(rows), rows, **options)
            found.extend([seen, moved.astype(dict.fromkeys(drift.SIGN, "float32"))])
        return found[number]

    kinds = ["predictions", "drift"] if options.get("methods") != () else ["predictions"]
    given = {"model": name, "uses": [*grid, *USES[part]]}
    names = [f"{part}_{kind}_{name}" for kind in kinds]
    return [stored(own, key, lambda n=n: table(n), **given) for n, key in enumerate(names)]


# %% tags=["yours"]
def maps_of(name, study, part="test"):
    """The predictions and the drift that section 5 has measured."""
    given = {"model": name, "section": "5 How far do the maps move?"}
    names = [f"maps_{part}_{kind}_{name}" for kind in ("predictions", "drift")]
    return [stored(study_of(name, study), key, **given) for key in names]


def some_images(study, part, count):
    """`count` images of a split, drawn once and for all; None: all of them."""
    return np.sort(np.random.default_rng(run.seed).permutation(study.rows(part))[:count])


def patients_of(study, images):
    """The patient of each image: resampling is by patient, not by image."""
    return pd.Series(study.patients(images), index=images)


# %% [markdown]
# **What this will cost.** Before hours are spent: each phase with the passes of images that the settings ask for, counted
# from these alone, and the time that they take here, measured on a few random batches and, for the trainings, on images
# read and augmented. *At most* counts an attack as if it fooled nobody, and a training as if it never stopped early. Left
# out are figures of a few images, models of your own, and what the CPU does with maps and tables. A run that has a
# budget (`hours`; on Kaggle 11 of the session's 12) ends between two phases or epochs before it is cut off, and goes on
# in the next session. `python -m dlia_utils plan --nb 04 --profile full --device t4` tells the same of Kaggle's GPUs
# beforehand. The cells that count are folded.

# %% tags=["plan"]
study, phases = open_study(run), []
sizes = {part: len(study.rows(part)) for part in ("train", "val", "test")}
count = len(study.dataset.classes)
small = partial(models.resnet18_cifar, num_classes=count, width=run.width)
large = partial(
    models.mobilenet_v2, num_classes=count, width=run.mobilenet_width, stages=run.stages
)
networks = {"resnet18": plan.Network(small, run.size, run.map_batch)}
networks["mobilenet_v2"] = plan.Network(large, run.mobilenet_size, run.map_batch)
EPOCHS = {"resnet18": run.epochs, "mobilenet_v2": run.mobilenet_epochs}
how = dict(batch=run.batch_size, val=sizes["val"], exact=run.patience is None)
how |= dict(objective="cross_entropy", settings="epochs mobilenet_epochs")
for name in networks:
    given = ("trainings", name, sizes["train"], EPOCHS[name])
    phases += plan.training(*given, **how) * 2  # on clean and on corrupted images

# %% tags=["plan"]
cells = {"corruptions": 1 + len(run.corruptions) * len(run.severities)}
cells["mapped"] = 3 + len(run.mapped) * len(run.severities)  # clean, and again with a partner
chosen = min(run.choose_images, sizes["val"])
mapped = min(run.map_images or sizes["test"], sizes["test"])
for name in networks:
    seen, told = 2 * sizes["test"] * cells["corruptions"], dict(settings="corruptions severities")
    phases.append(plan.Phase("corrupted images", name, sizes["test"], seen, **told))
    drawn, told = 2 * (mapped + chosen) * cells["mapped"], dict(settings="mapped map_images")
    phases.append(plan.Phase("maps", name, mapped, drawn, drawn, **told))
loader = study.torch_set("train", augmented=True)

# %%
prices = plan.measured(networks, run.device, loader)
cost = plan.table(networks, phases, prices, gpus=torch.cuda.device_count() or 1)
print(plan.advice(cost, run.budget))
report.show(cost, digits=3)

# %% [markdown]
# ## 1 The question, and a trap
#
# A warning is a score that is *higher when the answer is wrong*. How good it is, the **AUROC** says (the area under the ROC
# curve of the score): the probability that a copy of an image with a wrong answer has moved further than one with a right
# answer. 0.5 is a coin.
#
# Here is the trap. Invent copies in three severities of corruption. Severity moves the map, and severity makes answers wrong.
# Nothing else connects the two:

# %%
rng = np.random.default_rng(0)
severity = np.repeat([1, 3, 5], 1000)
moved = severity + rng.normal(size=3000)  # severity moves the map ...
wrong = rng.random(3000) < severity / 8  # ... and severity makes answers wrong
print(f"all copies together: AUROC {roc_auc_score(wrong, moved):.2f}")
for step in (1, 3, 5):
    own = severity == step
    print(f"only severity {step}:    AUROC {roc_auc_score(wrong[own], moved[own]):.2f}")

# %%
figure, ((axis,),) = plots.panels(1, width=7.6, height=2.8)
for place, (name, color) in enumerate((("right", plots.COLORS[0]), ("wrong", plots.COLORS[1]))):
    own = wrong == (name == "wrong")
    across = severity[own] + 0.5 * place + rng.uniform(-0.15, 0.15, own.sum())
    axis.scatter(across, moved[own], 7, color, marker="os"[place], alpha=0.4, linewidths=0)
    axis.text(1 + 0.5 * place, -3.2, name, color=color, ha="center", fontsize=10)
axis.set(xlabel="severity (invented)", ylabel="how far the map moved", ylim=(-4, 9))
axis.set_xticks([1.25, 3.25, 5.25], [1, 3, 5])
plots.titled(figure, "All severities together suggest a warning; one alone does not", "invented")
report.save_figure(figure, run, "trap")
figure

# %% [markdown]
# **What to see in it.** Wrong answers become more frequent to the right, and all points rise to the right. Within one severity
# the two clouds stand side by side at the same height: there the movement tells nothing. Who mixes the severities finds
# a "warning" all the same, and it would be worth nothing to somebody with one image in hand.
#
# So the question is put in three readings below, from the loosest to the strictest, and to every reading the score has rivals
# that need no map: the network's own **uncertainty** (1 minus its highest probability), and the **shift of the
# probabilities** between the clean image and its copy.
#
# | reading | which copies are compared |
# |---|---|
# | mixed | any, each image weighing the same |
# | within | those under the same corruption at the same severity |
# | same answer | moreover, only of images that got the same answer when clean |

# %% [markdown]
# **What we learnt.** A score and an error may go together only because severity drives both. A fair test compares copies
# at equal corruption and severity, and compares the score with rivals that cost less.

# %% [markdown]
# ## 2 The images, and fourteen ways to corrupt them
#
# **The data** is *Chest X-Ray Images (Pneumonia)* (Kermany, Zhang and Goldbaum, 2018) unless you say otherwise: `CHANGES =
# {"dataset": "covid"}` above takes any classification set of the suite, and every 2-D set of MedMNIST, whose file (for
# example `pneumoniamnist_64.npz`) is found like any other data set. The thesis took its validation images from the training
# set. Here validation is drawn by patient, and the test images stay closed until everything is chosen.
#
# **MedMNIST** keeps its own split, and a set named without a size its own 28 px: ResNet-18's last map has then 4 x 4 places.
# MobileNetV2 reads the same images enlarged. Few images need more epochs; for BreastMNIST's 546 the study below used
# `CHANGES = {"dataset": "breastmnist", "epochs": 20, "mobilenet_epochs": 10}`.

# %%
study = open_study(run)
print(study.dataset.split_rule)
report.show(datasets.summary(study.dataset))

# %%
audit = split.audit(study.dataset)
report.show(audit[audit["count"].gt(0)], notes=f"{len(audit)} checks; those that found anything.")

# %% [markdown]
# The audit counts what would make a test too easy. Where it warns of equal patient *numbers* in validation and test, look at
# the line of number *and kind*: this data set numbers its normal and its ill patients separately.
#
# **A corruption is a line of code.** Noise is added, contrast is taken away around the image's own mean:

# %%
study = open_study(run)
row = study.rows("train")[study.labels(study.rows("train")).cpu().numpy() == 1][0]
x = study.images([row])[0, 0].cpu()
noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(run.seed))
noisy = (x + 0.18 * noise).clamp(0, 1)
flat = x.mean() + 0.2 * (x - x.mean())
names = ["the image", "noise, sigma 0.18", "contrast, a fifth"]
figure = plots.figure_samples(torch.stack([x, noisy, flat]), names, run.caption, columns=3)
figure.set_dpi(100)
figure


# %% [markdown]
# **What to see in it.** Both copies are severity 3 of ImageNet-C. A reader still recognises the chest in the last one, though
# its grey values span a fifth of their range; for a network that learnt from the first kind of image both are new.

# %% [markdown]
# **The fourteen.** Five are the thesis': Gaussian noise, speckle (noise in proportion to the grey value), motion blur, contrast
# and brightness, in the five severities of ImageNet-C (Hendrycks and Dietterich, *Benchmarking Neural Network Robustness to
# Common Corruptions and Perturbations*, 2019, [arXiv 1903.12261](https://arxiv.org/abs/1903.12261)). Nine more are what
# happens to radiographs: less dose, scattered light, blades of the collimator, a burnt-in letter, a grid that stood still,
# coarse pixels, few grey levels, JPEG compression, noise of few photons. Three rules keep the comparison clean:
#
# 1. Clean and corrupted images are in [0, 1], and the network does the rest itself. (In the thesis clean images lay in
#    [-1, 1] and corrupted ones in [0, 1], so that every difference also measured a shift of the range.)
# 2. What is drawn for an image depends on its row, the corruption and the seed, never on its neighbours in a batch.
# 3. Severities of one image differ in strength only: the noise pattern and the angle of the blur stay.

# %%
def corrupted(name, x, row):
    """One image as this run sees it: clean, then in each severity."""
    options = {"seed": run.seed, "ids": [row], "scale": run.scale}
    return [corrupt.apply(name, x, step, **options)[0] for step in (0, *run.severities)]


study = open_study(run)
row = study.rows("train")[study.labels(study.rows("train")).cpu().numpy() == 1][0]
own = study_of("mobilenet_v2", study)
titles = ["clean", *(f"severity {step}" for step in run.severities)]

# %%
lines = []
for name in run.corruptions:
    above = [""] * len(titles) if lines else titles
    pairs = zip(above, corrupted(name, own.images([row]), row), strict=True)
    lines.append((name.replace("_", " "), [figures.Picture(*pair) for pair in pairs]))
figure = figures.figure_grid(lines, f"scale {run.scale}, {own.run.caption}")
report.save_figure(figure, run, "corruptions")
figure

# %% [markdown]
# **What to see in it.** ImageNet-C's scale is harsh for radiographs; at the right end a radiologist would send the image back.
# That is intended: the question is whether anything *warns*, and a warning can only be judged where things go wrong.
# Collimation, in contrast, takes nothing from the lungs and looks harmless.

# %% [markdown]
# **What we learnt.** Clean and corrupted copies must differ in the corruption and in nothing else: same range of values, same
# random draw at every severity, whatever the batch.

# %% [markdown]
# ## 3 Training, with and without corrupted images
#
# Two networks: the thesis' **ResNet-18** in its form for small images (no pooling at the start, so that the maps stay
# large), from scratch; and **MobileNetV2** from pretrained weights where they can be had. Each is trained twice, with the
# same flips, shifts and zooms, the same epochs and the same start:
#
# - *plain*: on clean images;
# - *augmented*: every image in every epoch is left clean or corrupted by one of the five corruptions, all six alike, at a random
#   severity. (The thesis put thirty copies of every image into memory. A fresh draw in each epoch shows the same
#   without that.)
#
# The draw, for one image and six epochs:

# %%
rng, names = np.random.default_rng(run.seed), ["clean", *run.trained_on]
for epoch in range(1, 7):
    name, severity = rng.choice(names), rng.integers(1, 6)
    print(f"epoch {epoch}:", name if name == "clean" else f"{name}, severity {severity}")


# %% [markdown]
# The library's `TrainAugmentor` does this around any data set. Three short functions make up a training: the network, its
# images, and the fit. The best epoch is chosen on *clean* validation images, for both trainings alike, by their AUC.
# (In the smoke profile with its few validation images MobileNetV2's AUC is 1 for many epochs, so there its loss chooses.)

# %%
def build(name, study):
    """A fresh network, the same start for both trainings."""
    count = len(study.dataset.classes)
    if not name.startswith("resnet18"):
        return studies.build_model(study.run, classes=count)
    return models.resnet18_cifar(num_classes=count, width=run.width, seed=run.seed).to(run.device)


# %%
def train_set_of(name, study):
    """Flips, shifts and zooms for both; grey values are changed by the corruptions alone."""
    images = study.torch_set("train", augmented=augment.train_transform(exposure=0, blur=0))
    if not name.endswith("augmented"):
        return images
    return corrupt.TrainAugmentor(images, names=run.trained_on, seed=run.seed, scale=run.scale)


# %%
def fit(name, study):
    """Train one network, or read it back."""
    own = study_of(name, study)
    loss = objectives.cross_entropy(weight=own.class_weights())
    images, how = train_set_of(name, own), {"monitor": own.run.monitor}
    if name in run.own:
        return studies.train_model(own, name, loss, train_set=images, **how)
    model, how["schedule"] = build(name, own), run.schedule
    fitted = studies.fit_model(own, name, model, loss, images, own.torch_set("val"), **how)
    if name.startswith("resnet18"):
        files.write_text("random", run.run_dir / name / "weights.txt")  # what result rows will say
    return fitted


# %%
study = open_study(run)
fitted = {}
for name in MODELS:
    with tracked(f"training {name}"):
        fitted[name] = fit(name, study)

# %%
rows = []
for name, one in fitted.items():
    best = one.history.set_index("epoch").reindex([one.best_epoch]).iloc[0]
    row = {"model": name, "size": study_of(name, study).run.size, "epochs": len(one.history)}
    row |= {"best epoch": one.best_epoch, "validation AUC": best["val_auc"]}
    row |= {"validation accuracy": best["val_accuracy"], "minutes": one.seconds / 60}
    rows.append(row)
report.show(pd.DataFrame(rows))

# %%
logs = {name: run.run_dir / name / "metrics.csv" for name in MODELS}
histories = {name: pd.read_csv(log) for name, log in logs.items() if log.exists()}
figure = plots.figure_history(histories, run.caption)
figure.set_dpi(88)
report.save_figure(figure, run, "training")
figure

# %% [markdown]
# **What to see in it.** The augmented trainings keep a higher loss, since most of the images they see are corrupted: do not compare
# the losses, compare the AUC on the clean validation images on the right. A jumping curve is a small validation set.

# %% [markdown]
# **What we learnt.** Training on corrupted images is the same recipe with another source of images. Its loss is higher
# because its task is harder; whether that pays is a question for corrupted *test* images.

# %% [markdown]
# ## 4 How far does accuracy fall?
#
# The test images are opened here. Each is seen clean and through every corruption at every severity by all networks. Two
# things are counted:
#
# - **AUC** clean and corrupted, and the difference ΔAUC of the thesis. Both are resampled on the same patients, so
#   that the interval is that of the *difference*.
# - **mCE**, the *mean corruption error* of Hendrycks and Dietterich (*Benchmarking Neural Network Robustness to Common
#   Corruptions and Perturbations*, 2019, [arXiv 1903.12261](https://arxiv.org/abs/1903.12261)): for each corruption *c* the
#   error *E* summed over the severities *s*, divided by the same sum *R* of a reference network; then the mean of
#   these ratios over all *C* corruptions,
#
# $$\text{mCE} = \frac{1}{C} \sum_c \frac{\sum_s E_{c,s}}{\sum_s R_{c,s}}.$$
#
# ImageNet-C refers to AlexNet. Here the reference is the plainly trained network of the same kind, so that *below 1* reads
# "better than plain training". The error is 1 - balanced accuracy, since classes are of unequal size. The **relative**
# mCE counts only what is lost against clean images. By hand, for two corruptions in three severities:

# %%
# A line for each corruption, a column for each severity
reference = np.array([[0.10, 0.30, 0.50], [0.10, 0.20, 0.30]])  # trained plainly
error = np.array([[0.10, 0.15, 0.20], [0.12, 0.21, 0.33]])  # trained on the first of the two
ratio = error.sum(axis=1) / reference.sum(axis=1)
print(f"corruption errors {ratio.round(2)}, mCE {ratio.mean():.2f}")

# %% [markdown]
# Half the error on the first, a tenth more on the second: the mean hides who gains and who loses. So it is taken apart below for
# corruptions that the training had seen and others.

# %%
study = open_study(run)
test_opened(study, "predictions under corruption")
rows = study.rows("test")
patients = patients_of(study, rows)
options, predictions = {"names": run.corruptions, "methods": ()}, {}
for name in MODELS:
    (predictions[name],) = measured(name, study, "test", rows, **options)

# %%
grids = {}
for name, table in predictions.items():
    grids[name] = grid = corruption_error.grid(table, patients, draws=run.bootstrap_draws)
    own = corruption_error.metric_rows(grid)
    made = report.result_rows(own, study_of(name, study).run, model=name)
    report.update_results(made, RESULTS)

# %% [markdown]
# Right answers on clean images, beside those of a **constant answer**, always the most frequent class: what lies near that
# line has learnt little, whatever it loses later.

# %%
labels = study.labels(rows).cpu()
right = {"constant answer": labels.eq(labels.mode().values).numpy()}
for name, table in predictions.items():
    clean = table[table["corruption"].eq("clean")].set_index("image").loc[rows]
    right[name] = clean["predicted"].eq(clean["label"]).to_numpy()

# %%
for name, flags in right.items():
    found = metrics.share(flags, patients, draws=run.bootstrap_draws) | {"metric": "accuracy"}
    made = report.result_rows(pd.DataFrame([found]), study_of(name, study).run, model=name)
    made = made if name in MODELS else made.assign(epochs=0, weights="none")
    results = report.update_results(made, RESULTS)
accuracy = results[results["metric"].eq("accuracy")]
report.show(report.wide(accuracy, only=["accuracy"]).reset_index())

# %% [markdown]
# And the AUC on test images that look like no image of training or validation. Patients told apart are no safeguard where
# the data set names none, as MedMNIST does not, or where an image was filed twice. (On few pixels strangers look alike, too: the
# count of look-alikes is an upper bound for copies.)

# %%
manifest = split.with_looks(study.dataset, study.cache.images).manifest
known = set(manifest["look"][manifest["split"].ne("test")])
alone = rows[~manifest["look"].isin(known).to_numpy()[rows]]
for name, table in predictions.items():
    own = table[table["corruption"].eq("clean") & table["image"].isin(alone)]
    auc = corruption_error.grid(own, patients, draws=run.bootstrap_draws)
    auc = corruption_error.metric_rows(auc).assign(attack="clean, no look-alikes")
    made = report.result_rows(auc, study_of(name, study).run, model=name)
    results = report.update_results(made, RESULTS)
auc = results[results["attack"].str.startswith("clean") & results["metric"].eq("auc")]
note = f"{len(alone)} of {len(rows)} test images have no look-alike."
report.show(report.wide(auc, "attack").reset_index(), notes=note)

# %%
rows = []
for name, grid in grids.items():
    worst = grid.loc[grid["value"].idxmin()]
    row = {"model": name, "clean AUC": report.with_interval(grid.iloc[0])}
    row |= {"lowest AUC": report.with_interval(worst)}
    rows.append(row | {"under": f"{worst['corruption']} {worst['severity']}".replace("_", " ")})
report.show(pd.DataFrame(rows), notes="In brackets: 95 % intervals, by resampling patients.")


# %% [markdown]
# The same in pictures: a panel for each corruption, severity to the right. First ResNet-18.

# %%
def auc_figure(plain):
    """The AUC of both trainings of a network over severity, a panel a corruption."""
    names = run.corruptions
    figure, axes = figures.shared_panels(len(names), columns=4 + (len(names) > 12), height=1.7)
    for number, model in enumerate((plain, PAIRS[plain])):
        look = plots.line_style(number)
        for axis, name in zip(axes.flat, names, strict=False):
            own = grids[model][grids[model]["corruption"].isin(["clean", name])]
            axis.plot(own["severity"], own["value"], ms=3.5, lw=1.3, label=model, **look)
            band = {"color": look["color"], "alpha": 0.15}
            axis.fill_between(own["severity"], own["ci_low"], own["ci_high"], **band)
            axis.set_title(name.replace("_", " "))
    low = pd.concat([grids[m].assign(model=m) for m in (plain, PAIRS[plain])], ignore_index=True)
    low = low.loc[low["value"].idxmin()]
    title = f"Lowest AUC {low['value']:.2f}: {low['model']}, {low['corruption']} {low['severity']}"
    caption, below = study_of(plain, study).run.caption, "AUC over severity; bands: intervals"
    figures.finish(figure, title.replace("_", " "), caption, below)
    report.save_figure(figure, run, f"auc_{plain}")
    return figure


# %%
figure = auc_figure("resnet18")
figure

# %% [markdown]
# **What to see in it.** The first five panels are corruptions that the augmented training had seen, the others are new to
# both. Where the two lines lie apart, training on corrupted images changed something; where both bands overlap, the
# test split cannot tell. Below 0.5 the images are
# ranked the wrong way round.

# %%
for plain in [name for name in PAIRS if name != "resnet18"]:
    figure = auc_figure(plain)
    display(figure)


# %% [markdown]
# **What to see in it.** The same for MobileNetV2 (and a model of yours). Compare the steepest panel with that of ResNet-18: which
# corruption hurts depends on the network, so one network's list of dangers is not another's.

# %% [markdown]
# **Ranking and deciding.** AUC asks whether the images are still *ranked* right, the error whether the answers are still right
# at the threshold that was fixed on clean images. A corruption can leave the ranking nearly untouched and push all images to
# one side. So errors are counted at the fixed threshold.

# %%
def mean_errors(plain, kind, names):
    """Error and mCE of both trainings, means over the corruptions `names`, as result rows."""
    pair = {name: predictions[name] for name in (plain, PAIRS[plain])}
    own = {name: t[t["corruption"].isin(["clean", *names])] for name, t in pair.items()}
    for name, table in own.items():
        options = {"draws": run.bootstrap_draws}
        error = corruption_error.corruption_error(table, own[plain], patients, **options)
        mean = error[error["corruption"].eq("mean")].assign(corruption=f"mean of those {kind}")
        mean = corruption_error.metric_rows(mean)
        yield report.result_rows(mean, study_of(name, study).run, model=name)


# %%
seen = [name for name in run.corruptions if name in run.trained_on]
new = [name for name in run.corruptions if name not in seen]
kinds = {"seen in training": seen, "not seen": new}
parts = [one for p in PAIRS for kind, names in kinds.items() for one in mean_errors(p, kind, names)]
cost = pd.concat(parts)

# %%
report.update_results(cost, RESULTS)
words = {"error": "error (1 - balanced accuracy)", "ce": "mCE", "relative_ce": "relative mCE"}
cost = cost.assign(corruptions=cost["attack"], what=cost["metric"].map(words))
table = report.wide(cost, "what", down=["corruptions", "model"], only=words.values())
report.show(table, notes="mCE below 1: better than the plain training of the same network.")

# %% [markdown]
# **How to read it.** The plain trainings have mCE 1 by definition. Under "seen in training" both augmented networks must come out
# below 1: that is what they were trained for, and they do in the smoke run as in the real study. "Not seen" is the interesting half: does it
# carry over to damage that no training image had? Where the interval reaches across 1, this test split cannot say. A relative
# mCE has no interval where the reference loses nothing in some resamplings: a ratio to zero.

# %% [markdown]
# **What we learnt.** Training on corruptions lowers the mean corruption error below 1 on the corruptions seen in training, for both
# networks. Whether it helps against others has to be measured, corruption by corruption.

# %% [markdown]
# ## 5 How far do the maps move?
#
# How does one measure movement? Draw a warm spot, move it, and let it fade:

# %%
down, right = np.mgrid[0:8, 0:8]
spot = np.exp(-((down - 3) ** 2 + (right - 2) ** 2) / 4)
copies = {"moved by 3": np.roll(spot, 3, axis=1), "faded to a tenth": spot / 10}
for name, copy in copies.items():
    scaled = [(one - one.min()) / (one.max() - one.min()) for one in (spot, copy)]
    rmse, raw = (np.sqrt(np.mean((a - b) ** 2)) for a, b in (scaled, (spot, copy)))
    print(f"{name:17s} RMSE of scaled maps {255 * rmse:5.1f} of 255, unscaled {raw:.3f}")


# %% [markdown]
# The thesis scaled each map by its own extremes to 0..255 and took the RMSE (root mean squared error). That sees the move, and is
# blind to fading. Unscaled, both show, but one bright pixel rules. So there are several scores here:
#
# - *RMSE* scaled (the thesis') and unscaled; *SSIM*, structural similarity; *Spearman's* rank correlation;
# - overlap of the highest tenth; shift of the centre of mass.
#
# The maps are **saliency**, the size of the gradient at every pixel (Simonyan, Vedaldi and Zisserman, *Deep Inside
# Convolutional Networks*, 2013, [arXiv 1312.6034](https://arxiv.org/abs/1312.6034)), and **Grad-CAM** (Selvaraju et al.,
# 2017, [arXiv 1610.02391](https://arxiv.org/abs/1610.02391)) and **Grad-CAM++** (Chattopadhay et al., 2018,
# [arXiv 1710.11063](https://arxiv.org/abs/1710.11063)) at eight layers. Three rules, the first two against slips of the thesis:
#
# 1. *One code path.* The clean image and its copies go through the same function. (There, the clean map was computed on an
#    image garbled by a conversion to 8 bits.)
# 2. *One class.* The class explained is the one predicted on the clean image, also where the copy is called
#    something else. (There, it was the class of the moment, so a change of the answer looked like drift.)
# 3. *A floor and a ceiling.* The same image explained again (floor), and another image explained for the same class
#    (ceiling). A drift of 40 grey levels means little if two different images differ by 45.
#
# First one image, with Grad-CAM++ from the first layer to the last.

# %%
def map_line(model, x, target, titled):
    """The image, then its Grad-CAM++ over it, layer by layer; each by its own range."""
    found = drift.read(model, x, target=target, methods=["gradcam++"])[2]
    pictures = [figures.Picture("image" if titled else "", x[0])]
    for (_, layer), heat in found.items():
        unit = drift.prepared(heat)["unit"][0]
        pictures.append(figures.Picture(layer if titled else "", x[0], unit, alpha=0.5))
    return pictures


# %%
study = open_study(run)
test_opened(study, "maps of one image")
name, severity = "resnet18", run.severities[len(run.severities) // 2]
row = some_images(study, "test", None)[:1]
own, model = study_of(name, study), load_models(study, [name])[name]
options = {"seed": run.seed, "ids": row, "scale": run.scale}
x, lines = own.images(row), []
target = int(model(x).argmax())  # the class of the clean image

# %%
for kind in ("clean", *run.trained_on):
    copy = x if kind == "clean" else corrupt.apply(kind, x, severity, **options)
    p = model(copy).softmax(1)[0].detach()
    answer = f"{study.dataset.classes[int(p.argmax())]} {p.max():.2f}"
    pictures = map_line(model, copy, target, titled=not lines)
    lines.append((f"{kind}\n{answer}".replace("_", " "), pictures))
figure = figures.figure_grid(lines, f"{name}, severity {severity}, {own.run.caption}")
report.save_figure(figure, run, "maps_of_one_image")
figure

# %% [markdown]
# **What to see in it.** Left of each line stand the corruption, the network's answer, and its probability. Go down a column:
# early layers follow edges and noise, late layers show a few coarse patches, and it is the late ones that people read as "where
# the network looks". Does a line whose answer changed look different from those whose answer stayed? By eye, on one
# image, nobody can tell. Hence numbers.

# %% [markdown]
# Now many test images in every severity. It is also done for some *validation* images: they will choose, in section 7, which
# of the many scores is put to the test.

# %%
study = open_study(run)
test_opened(study, "drift of the maps")
images = {"test": some_images(study, "test", run.map_images)}
images["val"] = some_images(study, "val", run.choose_images)
moved = {}
for name in MODELS:
    for part, rows in images.items():
        moved[part, name] = measured(name, study, f"maps_{part}", rows, names=run.mapped)[1]

# %%
rows = []
for (part, name), table in moved.items():
    zero = table.groupby(["method", "layer"])["zero"].mean()
    row = {"model": name, "images of": part, "images": table["image"].nunique()}
    rows.append(row | {"zero maps": f"{zero.max():.0%}", "at most, in": " ".join(zero.idxmax())})
report.show(pd.DataFrame(rows))


# %% [markdown]
# Zero maps are counted because two empty maps agree perfectly: where they are many, a small drift means nothing.

# %%
def by_layer(table):
    """Mean drift of Grad-CAM++ in each cell and layer, and the middle half of the ceiling."""
    own = table.query("method == 'gradcam++'")
    layers = list(own["layer"].unique())
    means = own.groupby(["corruption", "severity", "layer"])["rmse"].mean().unstack()[layers]
    pairs = own[own["corruption"].eq(drift.CEILING)].groupby("layer")["rmse"]
    return means, pairs.quantile([0.25, 0.75]).unstack().loc[layers]


# %%
def drift_figure(plain):
    """How far Grad-CAM++ moves in both trainings of a network, layer by layer."""
    across, references = len(run.severities), {"floor": drift.FLOOR, "ceiling": drift.CEILING}
    figure, axes = figures.shared_panels(2 * across, columns=across, height=2.3)
    for line, name in zip(axes, (plain, PAIRS[plain]), strict=True):
        means, half = by_layer(moved["test", name])
        layers = list(means)
        for axis, severity in zip(line, run.severities, strict=True):
            for number, kind in enumerate(run.mapped):
                look = plots.line_style(number) | {"label": kind.replace("_", " ")}
                axis.plot(layers, means.loc[kind, severity], ms=3.5, lw=1.2, **look)
            for style, (label, kind) in zip((":", "--"), references.items(), strict=True):
                axis.plot(layers, means.loc[kind, 0], color="0.4", ls=style, label=label)
            axis.fill_between(layers, half[0.25], half[0.75], color="0.5", alpha=0.15, lw=0)
            axis.set_title(f"severity {severity}")
            axis.tick_params(axis="x", rotation=90, labelbottom=name != plain)
        line[0].set_ylabel(name.replace("_augmented", "\naugmented").replace("_", " "))
    most = means.xs(severity, level="severity").mean(axis=1).idxmax()
    title = f"{most} moves the maps of {name} most (severity {severity})".replace("_", " ")
    below = "RMSE of scaled maps (0 to 255), layers from shallow to deep"
    figures.finish(figure, title, study_of(plain, study).run.caption, below)
    report.save_figure(figure, run, f"drift_{plain}")
    return figure


# %%
figure = drift_figure("resnet18")
figure

# %% [markdown]
# **What to see in it.** Read the grey lines first: the dotted one is the floor (the same image again, which must be near 0), the
# dashed one the ceiling (two different images; grey: the middle half of such pairs). Where a coloured line reaches the ceiling, the maps of the clean and of the
# corrupted image are no more alike than those of two different images: such a map is no longer about this image.

# %%
for plain in [name for name in PAIRS if name != "resnet18"]:
    figure = drift_figure(plain)
    display(figure)


# %% [markdown]
# **What to see in it.** Compare the upper line of panels (plain) with the lower (augmented), and shallow layers with deep ones: which
# corruption moves the maps most, and does training on corruptions hold them still?

# %% [markdown]
# In numbers, at the highest severity, for the deepest layer and for saliency: 0 is the floor and 1 the ceiling.
# Above 1, two images' maps have more in common (both show a chest) than an image and its corrupted copy.

# %%
def places(table):
    """Drift at the highest severity between floor (0) and ceiling (1), by method and layer."""
    keys = ["corruption", "severity", "method", "layer"]
    means = table.groupby(keys, sort=False)["rmse"].mean().unstack("corruption")
    floor, ceiling = (means[which].xs(0) for which in (drift.FLOOR, drift.CEILING))
    high = means.xs(run.severities[-1])[list(run.mapped)]
    return high.sub(floor, axis=0).div(ceiling - floor, axis=0)


# %%
rows = []
for name in MODELS:
    place = places(moved["test", name])
    deepest = [layer for method, layer in place.index if method == "gradcam++"][-1]
    for key in (("gradcam++", deepest), ("saliency", "input")):
        rows.append({"model": name, "map": " ".join(key)} | place.loc[key].to_dict())
report.show(pd.DataFrame(rows))

# %% [markdown]
# **What we learnt.** A distance between maps means something only between a floor and a ceiling, and only where the maps are not
# empty. In the real study severe corruption took the maps of plain networks beyond the ceiling.

# %% [markdown]
# ## 6 Corruption by corruption: the fall of the AUC against the movement of the maps
#
# This is the thesis' picture. It drew *every image* against the one ΔAUC of its cell (a corruption at a severity). Images
# of a cell share that number, and a thousand points then look like evidence where there are a few dozen. How much that
# matters, two unrelated columns of 15 numbers show, before and after each is written down 40 times:

# %%
x, y = np.random.default_rng(4).normal(size=(2, 15))
for times in (1, 40):
    rank = spearmanr(np.repeat(x, times), np.repeat(y, times))
    print(f"{15 * times:3d} points: rank correlation {rank.statistic:+.2f}, p = {rank.pvalue:.2g}")

# %% [markdown]
# The same correlation, and noise has become "highly significant". So below a point is a *cell*, and Spearman's rank
# correlation in each title is over cells.

# %%
study = open_study(run)
seen, moved = ({name: maps_of(name, study)[part] for name in MODELS} for part in (0, 1))
patients = patients_of(study, seen[MODELS[0]]["image"].unique())
options = {"draws": run.bootstrap_draws}
grids = {name: corruption_error.grid(one, patients, **options) for name, one in seen.items()}
CELL = ["corruption", "severity"]


# %%
def scatter_figure(plain):
    """The fall of the AUC against the drift, for both trainings of a network."""
    figure, axes = figures.shared_panels(2, height=3.6)
    for axis, name in zip(axes.flat, (plain, PAIRS[plain]), strict=True):
        drifted = moved[name].query("method == 'gradcam++'").groupby(CELL, sort=False)["rmse"]
        cells = grids[name].set_index(CELL)[["drop"]].join(drifted.mean(), how="inner")
        for number, (kind, part) in enumerate(cells.groupby("corruption", sort=False)):
            look = plots.line_style(number)
            axis.plot(part["rmse"], part["drop"], color=look["color"], lw=0.7, alpha=0.5)
            size = 12 + 14 * part.index.get_level_values("severity")
            dots = {"marker": look["marker"], "label": kind.replace("_", " ")}
            axis.scatter(part["rmse"], part["drop"], size, look["color"], **dots)
        axis.axhline(0, color="0.6", lw=0.8)
        rank = spearmanr(cells["rmse"], cells["drop"]).statistic
        axis.set_title(f"{name}: Spearman {rank:+.2f} over {len(cells)} cells")
        axis.set_xlabel("mean RMSE of the maps")
    axes[0, 0].set_ylabel("drop of the AUC (clean minus corrupted)")
    title = "Do maps (Grad-CAM++) move more where the AUC drops more?"
    caption = study_of(plain, study).run.caption
    figures.finish(figure, title, caption, "larger points: higher severity")
    report.save_figure(figure, run, f"scatter_{plain}")
    return figure


# %%
figure = scatter_figure("resnet18")
figure

# %% [markdown]
# **What to see in it.** A line joins the severities of one corruption; the larger the point the higher the severity. Mostly the
# lines rise to the right: what moves the maps more costs more AUC. Now recall section 1: severity drives both axes, so
# the points of one corruption would rise together whatever the maps show.

# %%
for plain in [name for name in PAIRS if name != "resnet18"]:
    figure = scatter_figure(plain)
    display(figure)

# %% [markdown]
# **What to see in it.** Compare *across* corruptions at equal size of the point: a corruption far to the right with hardly any
# loss, or a loss with hardly any movement, speaks against the map as a witness.

# %% [markdown]
# The numbers in the titles, once more by hand:

# %%
rows = []
for name in MODELS:
    drifted = moved[name].query("method == 'gradcam++' and severity > 0").groupby(CELL)["rmse"]
    lost = grids[name].set_index(CELL)["drop"].loc[drifted.mean().index]
    found = {"metric": "rank correlation of cells", "value": spearmanr(drifted.mean(), lost)[0]}
    own = pd.DataFrame([found | {"ci_low": np.nan, "ci_high": np.nan, "n": len(lost)}])
    whole = {"model": name, "attack": "drift and loss of AUC", "eps_unit": "all severities"}
    rows.append(report.result_rows(own, study_of(name, study).run, **whole))
made = pd.concat(rows)
report.update_results(made, RESULTS)
report.show(
    made[["model", "value", "n"]].rename(columns={"value": "rank correlation", "n": "cells"})
)

# %% [markdown]
# **What we learnt.** On the level of cells drift and loss of AUC go together; the real study found rank correlations of 0.84 to
# 0.92 over 30 cells. It is a statement about corruptions, not about images, and it cannot warn anybody.

# %% [markdown]
# ## 7 Image by image: does drift warn?
#
# Now the question itself. What a user needs is a score of *this image's* map that is higher when *this image's* answer is wrong.
# An AUROC is a count of pairs; "within" means that both partners of a pair come from one cell. By hand, on two cells:

# %%
# Drift of copies with a wrong answer, and of those with a right one, by cell
cells = {"noise 1": ([1.0], [0.4, 0.9, 1.2, 1.5]), "noise 5": ([4.1, 5.2, 6.0], [4.4, 5.8])}
won = [(np.array(wrong)[:, None] > np.array(right)).ravel() for wrong, right in cells.values()]
print(f"within: {np.concatenate(won).mean():.2f}")
wrong, right = (np.concatenate([cell[k] for cell in cells.values()]) for k in (0, 1))
print(f"mixed:  {(wrong[:, None] > right).mean():.2f}")

# %% [markdown]
# Within each cell half of the pairs are won, a coin. Mixed, severity has won the others.
#
# Three outcomes are asked: **error** (wrong answer), **flip** (another answer than on the clean image) and **new error** (wrong,
# though the clean image was read right).
#
# Why the third reading, *same answer*? A corruption often makes a network call everything one class. Then all images of the
# other class are wrong, and their maps, drawn for a class the network has given up, have moved: the score tells the classes
# apart and passes for a warning. Among images with the same clean answer it cannot.
#
# There are some hundred scores (methods, layers, measures), and the best of a hundred looks good by luck. So the choice is made
# on validation images, for each network, and the test images judge that one. The intervals are 95 % intervals from
# resampling patients (bootstrap).

# %%
study = open_study(run)
test_opened(study, "drift as a warning")
tables, chosen = {}, {}
options = {"against": ["uncertainty", "p_shift"], "draws": run.bootstrap_draws}
for name in MODELS:
    val, test = (maps_of(name, study, part) for part in ("val", "test"))
    chosen[name] = warning.select(*val)
    patients = patients_of(study, test[0]["image"].unique())
    tables[name] = warning.judge(*test, patients, predictors=[chosen[name]], **options)

# %%
for name, table in tables.items():
    rows = warning.metric_rows(table)
    made = report.result_rows(rows, study_of(name, study).run, model=name)
    report.update_results(made, RESULTS)
print("\n".join(f"{name} is judged by {' '.join(score)}" for name, score in chosen.items()))

# %%
KIND = {"p_shift": "shift of probabilities", "uncertainty": "uncertainty", "severity": "severity"}
cells = pd.concat([table.assign(model=name) for name, table in tables.items()])
cells = cells[cells["outcome"].eq("error") & cells["metric"].eq("auroc")]
cells["score"] = cells["predictor"].map(KIND).fillna("drift of the map")
wrong = cells["events"].astype(str) + " of " + cells["copies"].astype(str) + " copies wrong"
marked = cells.assign(series=cells["model"] + ": " + wrong)
options = {"panel": "reading", "row": "score", "series": "series", "chance": 0.5}
figure = figures.figure_forest(marked, f"AUROC for wrong answers, {run.caption}", **options)
report.save_figure(figure, run, "warning")
figure


# %% [markdown]
# **What to see in it.** Right of the dotted line a score warns; where the bar crosses it, nothing is shown. Look at the line
# "drift of the map" from panel to panel: what is left of it under the strictest reading? And is it ahead of the two
# rivals that need no map? Severity is a rival only in the mixed reading; elsewhere it is equal within a pair.

# %% [markdown]
# **In words.** The intervals decide: drift warns where the one of its AUROC lies above 0.5, and is better than the uncertainty
# where that of the difference, on the same images, lies above 0. Where fewer than ten patients have a wrong answer, or
# none but wrong ones, nothing is said.

# %%
def says(auroc, gain):
    """What the two intervals say of drift as a warning, and beside the uncertainty."""
    warns = "no warning of wrong answers by drift can be shown"
    if auroc["ci_low"] > 0.5:
        warns = "drift warns of wrong answers: copies with them drift more"
    elif auroc["ci_high"] < 0.5:
        warns = "drift does not warn of wrong answers: copies with them drift less"
    compared = "No difference to the model's own uncertainty can be shown"
    if gain["ci_low"] > 0:
        compared = "It ranks them better than the model's own uncertainty does"
    elif gain["ci_high"] < 0:
        compared = "The model's own uncertainty, which needs no map, ranks them better"
    return warns, compared


# %%
WHERE = {"within": "At equal corruption and severity", "mixed": "All copies mixed"}
WHERE["same answer"] = "At equal corruption, severity and clean answer"


def verdict(table, reading):
    """Two sentences on the drift score in `table`."""
    own = table[table["outcome"].eq("error") & table["reading"].eq(reading)]
    own = own[own["method"].ne("")]  # not the rivals
    auroc, gain = (own[own["metric"].eq(m)].iloc[0] for m in ("auroc", "auroc_over_uncertainty"))
    if min(auroc["event_patients"], auroc["other_patients"]) < 10:
        return f"{WHERE[reading]}, too few patients with wrong answers, or with right ones."
    warns, compared = says(auroc, gain)
    value = f"AUROC {report.with_interval(auroc)}, {auroc['events']} of {auroc['copies']} copies"
    more = f"drift minus uncertainty {report.with_interval(gain, signed=True)}"
    return f"{WHERE[reading]}, {warns} ({value}). {compared} ({more})."


# %%
lines = []
for name, table in tables.items():
    lines.append(f"**{name}** (chosen on validation: {' '.join(chosen[name])})\n")
    lines += [f"- {verdict(table, reading)}" for reading in warning.READINGS]
    lines.append("")
Markdown(report.finding(run, lines))

# %% [markdown]
# Beside its rivals, for wrong answers. Drift needs the clean image; so does the shift of the probabilities, which costs two
# forward passes and no map. A drift that does not beat it tells nothing that the two probabilities did not tell already.

# %%
options = {"down": ["model", "predictor"], "only": ["mixed", "within", "same answer"]}
table = report.wide(cells, "reading", **options).fillna("")
table = table.reset_index().rename(columns={"predictor": "score"})
report.show(table.replace(KIND))


# %% [markdown]
# The same by hand, without any statistic: how far the maps moved where the answer was kept, and where it was turned.

# %%
def kept_and_turned(name, study):
    """The chosen score, an image once for each corruption and fate of its answer."""
    (method, layer, score), (seen, moved) = chosen[name], maps_of(name, study)
    own = moved[moved["method"].eq(method) & moved["layer"].eq(layer)]
    own = own.merge(seen, on=["image", "corruption", "severity"])
    before = seen[seen["corruption"].eq("clean")].set_index("image")["predicted"]
    own["fate"] = np.where(own["predicted"].ne(own["image"].map(before)), "turned", "kept")
    return own.groupby(["corruption", "fate", "image"])[score].mean().reset_index(name="drift")


# %%
FATES = (("kept", plots.COLORS[0], -0.18), ("turned", plots.COLORS[1], 0.18))


def draw(axis, drifts, at, color, text):
    """Median, middle half, and the range of nine tenths of some drifts, with their number."""
    low, first, middle, third, high = drifts.quantile([0.05, 0.25, 0.5, 0.75, 0.95])
    axis.hlines(at, low, high, color, lw=1)
    axis.hlines(at, first, third, color, lw=7, alpha=0.4)
    axis.plot(middle, at, "o", color=color, ms=5)
    axis.text(high, at, f"  {text}, {len(drifts)}", color=color, fontsize=9, va="center")


# %%
name = "resnet18"
each = kept_and_turned(name, study)
figure, ((axis,),) = plots.panels(1, width=7.6, height=0.9 + 0.5 * len(run.mapped))
for number, kind in enumerate(run.mapped):
    for fate, color, place in FATES:
        own = each.loc[each["corruption"].eq(kind) & each["fate"].eq(fate), "drift"]
        if len(own):
            draw(axis, own, number + place, color, fate)
axis.set(ylim=(len(run.mapped) - 0.5, -0.5), xlabel=f"drift: {' '.join(chosen[name])}")
axis.set_yticks(range(len(run.mapped)), [kind.replace("_", " ") for kind in run.mapped])
axis.margins(x=0.2)

# %%
middle = each.groupby("fate")["drift"].median()
title = f"{name}: median drift " + ", ".join(f"{m:.3g} where {fate}" for fate, m in middle.items())
plots.titled(figure, title, f"number of images behind each bar; {run.caption}")
report.save_figure(figure, run, "kept_flipped")
figure

# %% [markdown]
# **What to see in it.** The point is the median, the bar the middle half of the images, the thin line nine tenths of them. Two
# bars of a corruption that stand apart are a warning; two that overlap are not. Where one of a pair is missing, no answer
# was turned, or all were.

# %% [markdown]
# **What we learnt.** Whether a map warns is a question for single images at equal severity, and it has an answer only beside
# rivals. In the real study drift did warn, and the probabilities alone warned better.

# %% [markdown]
# ## 8 What the real study found
#
# All 624 test images of *Chest X-Ray Images (Pneumonia)*, hospital radiographs of children, from a copy squashed to 224 px and
# encoded as JPEG a second time, in the `cpu` profile: a CIFAR-style ResNet-18 of half width at 64 px, from scratch, 8 epochs;
# MobileNetV2 at 112 px from pretrained weights, 5 epochs; 14 corruptions in 5 severities. **One seed (0)**: another training
# would give somewhat other numbers. The intervals are by patient and do not contain that.
#
# **What corruptions cost**, as in section 4 (the error of a constant answer is 0.5):
#
# <!-- table 04-corruptions -->
#
# Training on corrupted images lowers the mean corruption error to 0.51 (ResNet-18) and 0.32 (MobileNetV2) on the corruptions seen
# in training, and to 0.84 and 0.40 on the nine it never saw, with every interval clear of 1. On clean images
# the AUC hardly changes (0.960 and 0.957; 0.968 and 0.977). A smoke run shows the first of these too: below 1 on what was seen.

# %% [markdown]
# **Does a map that moves warn of a wrong answer?** AUROC for *the answer on this corrupted image is wrong*, six corruptions in
# five severities. The line that begins with a map is the drift score, one of 102 (map, layer, measure), that 150
# validation images chose. `p_shift` is the shift of the probabilities.
#
# <!-- table 04-warning -->
#
# - **Drift warns, and the probabilities alone warn better.** Within one corruption at one severity its AUROC is 0.60 to 0.84. The
#   shift of the probabilities, which needs the same two passes and no map, reaches 0.81 to 0.92: ahead for all four
#   networks, with intervals of the difference clear of 0.
# - **The network's own uncertainty, which needs no clean image, beats drift in three of four networks.** Drift is ahead (+0.09)
#   only for the plain MobileNetV2, which is sure of itself and wrong.
# - **Part of the warning is a mirage.** Among images with the same clean answer the plain MobileNetV2's 0.84 becomes 0.69, and the
#   plain ResNet-18's 0.66 becomes 0.40: worse than a coin. (This third reading was added after a first look at these results.)
#
# **On another organ, and on small images.** The same protocol on *BreastMNIST* (ultrasound, 156 test images) and *PneumoniaMNIST* (the 624
# test images above, made smaller), at 28 px, seed 0; MobileNetV2 reads them enlarged to 112 px. No patients are named, so
# the intervals take the images as independent:
#
# <!-- table 04-medmnist-corruptions -->
#
# - **The same:** training on corruptions lowers the error on those it saw, and the shift of the probabilities warns better than drift in
#   seven of eight networks (by 0.04 to 0.22, intervals clear of 0). In the eighth, the augmented ResNet-18 on ultrasound, the two are
#   even (+0.01 [-0.07, +0.08]).
# - **The uncertainty** beats drift in both augmented networks of PneumoniaMNIST, drift the uncertainty in its plain MobileNetV2 (+0.19) and
#   in both plain networks on ultrasound (+0.13 and +0.10).
# - **The mirage** is there again: among images with the same clean answer PneumoniaMNIST's plain networks fall from 0.76 to 0.57 and from 0.92
#   to 0.71.
# - **The audit of section 2 warns:** 51 of BreastMNIST's 156 test images look like an image of training or validation (on the other 105 the
#   clean AUC is no lower: 0.868 to 0.928), and 10 images of PneumoniaMNIST stand in training and in validation. None of its 624
#   test images has a look-alike.
#
# **Beside this run.** Compare the order of the lines, not the digits: is the shift of the probabilities ahead of drift here as
# well, and does drift lose from *within* to *same answer*? On few images the intervals are wide, and a tiny network may rank
# drift and uncertainty the other way round. More numbers, and what was not measured (the `full` profile, other seeds), are in
# [results/README.md](../results/README.md).

# %% [markdown]
# **What we learnt.** On hospital images a moving map does carry a warning, but in eleven of twelve networks a weaker one than the
# probabilities that the same two passes give for nothing; in the twelfth the two are even. Nobody needs the map for that purpose.

# %% [markdown]
# ## 9 Results and files
#
# For comparison with the thesis the run writes its kinds of files as CSV into the folder `thesis`: RMSE of Grad-CAM++ by corruption
# and layer for each severity and class (`*_rmses.csv`), image by image (`*_rmses_all.csv`), AUC by corruption and severity
# (`*_auc.csv`), and the tidy tables they were made from. A file name is the data set, class, severity and training, joined
# by `_`. The shape of such a table, on four numbers:

# %%
tidy = pd.DataFrame({"corruption": ["noise", "noise", "blur", "blur"], "layer": ["a", "b"] * 2})
tidy["rmse"] = [10.0, 20.0, 30.0, 40.0]
report.show(tidy.pivot_table(index="corruption", columns="layer", values="rmse", sort=False))


# %%
def slug(name):
    """A part of a file name: letters, digits and dots; "_" only separates parts."""
    kept = [letter if letter.isalnum() or letter == "." else "-" for letter in str(name)]
    return "".join(kept).strip("-.")


def drifts(seen, moved):
    """Drift of Grad-CAM++ with the label of each image, without floor and ceiling."""
    own = moved[moved["method"].eq("gradcam++") & moved["severity"].ne(0)]
    label = seen.drop_duplicates("image").set_index("image")["label"]
    cell = own["corruption"] + "/" + own["layer"]
    return own.assign(label=own["image"].map(label), cell=cell)


# %%
def rmse_tables(seen, moved, classes, start, suffix):
    """Mean RMSE, corruptions down and layers across, by severity and class; each image's."""
    own = drifts(seen, moved)
    parts, tables = {start: own}, {}
    for number, name in enumerate(classes):
        parts[f"{start}_{slug(name)}"] = part = own[own["label"].eq(number)]
        wide = part.pivot(index=["image", "severity"], columns="cell", values="rmse")
        tables[f"{start}_{slug(name)}{suffix}_rmses_all"] = wide[part["cell"].unique()]
    across = {"index": "corruption", "columns": "layer", "values": "rmse", "sort": False}
    for name, part in parts.items():
        for severity, cells in part.groupby("severity"):
            tables[f"{name}_sev{severity}{suffix}_rmses"] = cells.pivot_table(**across)
    return tables


# %%
def auc_table(seen, classes):
    """AUC of each class against the rest: clean, at each severity, and the drops (delta)."""
    rows = []
    for number in [1] if len(classes) == 2 else range(len(classes)):
        cells = seen.groupby(["corruption", "severity"], sort=False)
        auc = {k: roc_auc_score(one["label"].eq(number), one[f"p{number}"]) for k, one in cells}
        clean = auc.pop(("clean", 0))
        wide = pd.Series(auc).unstack(sort=False).rename_axis("corruption")
        table = wide.add_prefix("sev").join((clean - wide).add_prefix("delta_sev"))
        table.insert(0, "clean", clean)
        rows.append(pd.concat({classes[number]: table}, names=["class"]))
    return pd.concat(rows)


# %%
study = open_study(run)
folder, flag, classes = run.run_dir / "thesis", slug(run.location.dataset), study.dataset.classes
for name in MODELS:
    network, suffix = name.removesuffix("_augmented"), "" if name in PAIRS else "_augmented"
    seen, moved = maps_of(name, study)
    written = rmse_tables(seen, moved, classes, flag, suffix)
    written[f"{flag}{suffix}_auc"] = auc_table(seen, classes)
    for title, table in written.items():
        files.write_csv(table.reset_index(), folder / network / f"{title}.csv")
    for title, table in (("drift", moved), ("predictions", seen)):
        files.write_csv(table, folder / network / f"{flag}{suffix}_{title}.csv")

# %% [markdown]
# One of them, ResNet-18 at the highest severity: mean RMSE of Grad-CAM++ (of 255) by corruption and layer.

# %%
study = open_study(run)
name = f"{slug(run.location.dataset)}_sev{max(run.severities)}_rmses.csv"
table = pd.read_csv(folder / "resnet18" / name, index_col="corruption")
report.show(table.T.rename_axis("layer"), digits=0)

# %% [markdown]
# The AUC on clean images of all networks, and what the steps cost in time and memory (MiB):

# %%
results = pd.read_csv(made_by(run, "results.csv", "4 How far does accuracy fall?"))
clean = results[results["attack"].eq("clean") & results["metric"].eq("auc")]
table = report.wide(clean, only=["auc"]).reset_index().rename(columns={"auc": "AUC"})
report.show(table)

# %%
UNITS = {"wall_s": "seconds", "cpu_s": "CPU seconds", "memory_mib": "memory (MiB)"}
UNITS |= {"gpu_peak_mib": "GPU memory (MiB)"}
report.show(pd.read_csv(run.run_dir / "resources.csv").rename(columns=UNITS), digits=1)

# %%
report.written(run)

# %% [markdown]
# **What we learnt.** Tidy tables, a row for each image, corruption and severity, answer questions that were not asked when they were
# written; the wide tables of the thesis follow from them in a line.

# %% [markdown]
# ## Takeaways
#
# - A heat map that moves is a sign of a corruption, and on its own a weak warning of a wrong answer.
# - Put a rival beside every warning: how far the probabilities moved costs less than a map and warned better in seven
#   of the eight networks of the real studies; in the eighth the two were even.
# - Compare at equal corruption and severity; the mixture of severities makes warnings out of nothing.
# - A distance between maps needs a floor, a ceiling, one code path, one class, and a count of empty maps.
# - Training on corrupted images halves the error and more on what it saw; mCE below 1 says so against a named reference.

# %% [markdown]
# ## Exercises
#
# Each solution runs behind the opening cells once the sections above have been run.

# %% [markdown]
# **Exercise 1.** The mean corruption error by hand: take the stored predictions of both ResNet-18 trainings and compute, without
# the library, the corruption error of each corruption and their mean over those seen in training.
#
# <details><summary>Solution</summary>
#
# ```python
# study, section = open_study(run), "4 How far does accuracy fall?"
# error = {}
# for name in ("resnet18", "resnet18_augmented"):
#     table = stored(study, f"test_predictions_{name}", model=name, section=section)
#     right = table["predicted"].eq(table["label"])
#     recall = right.groupby([table["corruption"], table["severity"], table["label"]]).mean()
#     error[name] = 1 - recall.groupby(["corruption", "severity"]).mean()  # balanced
# sums = pd.DataFrame(error).drop("clean").groupby("corruption").sum()
# ratio = sums["resnet18_augmented"] / sums["resnet18"]
# print(ratio.round(2).to_string())
# print(f"mCE, seen in training: {ratio[list(run.trained_on)].mean():.3f}")
# ```
#
# </details>
#
# The mean is the mCE of section 4; the single ratios show that it is a mean of very unlike numbers.

# %% [markdown]
# **Exercise 2.** How much does the best of a hundred gain by luck? Rank all scores by their AUROC *within* on the test images of
# ResNet-18, and compare the best of them with the one that the validation images had chosen.
#
# <details><summary>Solution</summary>
#
# ```python
# study = open_study(run)
# aurocs, options = {}, {"events": ["error"], "readings": ["within"], "against": [], "draws": 0}
# for part in ("val", "test"):
#     tables = maps_of("resnet18", study, part)
#     patients = patients_of(study, tables[0]["image"].unique())
#     judged = warning.judge(*tables, patients, **options)
#     aurocs[part] = judged[judged["method"].ne("")].set_index("predictor")["value"]
# both = pd.DataFrame(aurocs)
# print(f"{len(both)} scores, rank correlation val to test {both.corr('spearman').iloc[0, 1]:.2f}")
# report.show(both.loc[[both["val"].idxmax(), both["test"].idxmax()]].assign(by=["val", "test"]))
# ```
#
# </details>
#
# Compare the two lines in the column of the test: what the best score on test has in advance of the chosen one is in part luck,
# and an honest study does not report it.

# %% [markdown]
# **Exercise 3.** The choice of the class matters. Explain a corrupted copy for the class predicted on the *clean* image and for the class
# of the moment, as the thesis did. For images whose answer turned, how different is the drift?
#
# <details><summary>Solution</summary>
#
# ```python
# study, name = open_study(run), "resnet18"
# model, rows = load_models(study, [name])[name], study.rows("val")[:64]
# x, layer = study.images(rows), ("gradcam++", "layer4_1")
# y = corrupt.apply("contrast", x, 5, seed=run.seed, ids=rows, scale=run.scale)
# _, target, clean = drift.read(model, x, methods=["gradcam++"])
# fixed = drift.read(model, y, target=target, methods=["gradcam++"])[2]
# _, now, moment = drift.read(model, y, methods=["gradcam++"])
# prepared = [drift.prepared(found[layer]) for found in (clean, fixed, moment)]
# scores = {"turned": (now != target).cpu().numpy()}
# for kind, other in zip(("clean's class", "class of the moment"), prepared[1:], strict=True):
#     scores[kind] = drift.compared(prepared[0], other)["rmse"]
# groups = pd.DataFrame(scores).groupby("turned")
# report.show(groups.mean().assign(n=groups.size()), digits=0)
# ```
#
# </details>
#
# Where the answer was kept the two agree; where it turned they differ, and the difference is that of the question
# asked, not of the image.
