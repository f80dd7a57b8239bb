# %% [markdown]
# # 01 Pneumonia: how fragile is MobileNetV2, and which defence really helps?
#
# A MobileNetV2 that reads chest X-rays is right on about nine images in ten. Change every pixel by less than the eye can
# see, in just the right direction, and it is wrong on nearly all of them. This notebook measures that fragility and puts
# the published remedies to an honest test: each is trained with the same recipe, then attacked by the same suite of
# attacks, and judged by its worst case on every single image.
#
# **What you will learn.**
#
# - how to attack a network in five lines, and why the gradient is all it takes;
# - how adversarial training, regularisers, distillation and noise are meant to help, each in a few lines of code;
# - how to measure robustness so that the number can be believed: several attacks, the worst case per image, intervals by
#   patient, and a check list that can fail;
# - why a model can *look* robust and be nothing of the kind (masked gradients).
#
# **Before you start.** You can train a classifier in PyTorch and know what a gradient is. No earlier notebook is needed.
#
# **Time.** Reading: 45 minutes for sections 1 to 7; the sections marked *Extra* can wait. Running: smoke (tiny networks,
# 48 px) about 90 seconds on a laptop; cpu at most 23 hours of one core, full at most 8 hours on
# Kaggle's two T4, both by the plan below, which counts each attack as if it fooled nobody (not seen yet).
#
# <!-- contents -->
#
# The outputs stored in this file are from the smoke profile on *synthetic* images: they show what you will see, and that
# the code works. What came out on real radiographs stands in section 7. Every section also runs alone after the opening
# cells, so you can copy one into a notebook of your own.
#
# *For research and teaching. Not a medical device.*

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"  # "smoke" (two minutes), "cpu" (a laptop, a night), "full" (GPU), or "auto"
DATA_DIR = ""  # empty: find the data set; else the folder of chest_xray, or your two class folders
RUN_NAME = ""  # empty: profile and kind of data
RESUME = True  # True: go on where a run stopped; False: anew; "force": under other settings
CHANGES = {}  # settings of your own, whatever the profile, such as {"epochs": 5}

# %% [markdown]
# **The settings.** FULL is the whole study; CPU and SMOKE are what is smaller on a laptop and in a first look. To change
# one, whatever the profile, write it into `CHANGES` above: `CHANGES = {"epochs": 5}`. A typo is told, a changed setting
# is starred below, and the run gets a folder of its own, which takes over whatever the change does not touch.
#
# **Your own images**: `DATA_DIR` may be any folder with a folder of images for each class (below `train`, `val` and
# `test` if you have a split). A CSV in it with the columns `file` and, as you have them, `label`, `patient`, `split`
# says more. Without patients every image counts as one: `patient_pattern` reads them from the file names.

# %% tags=["settings"]
from dlia_utils.attacks import evaluate
from dlia_utils.units import pixel_eps

# The data: per_class None is every image, a number a sample; own images are split by these shares
FULL = {"dataset": "pneumonia", "seed": 0, "size": 224, "per_class": None, "val_share": 0.15}
FULL |= {"test_share": None, "unusable_share": 0.0, "classes": None, "patient_pattern": ""}
# MobileNetV2, and the recipe of every training; max_minutes is for one model, None is no limit
FULL |= {"width": 1.0, "stages": 7, "pretrained": True, "epochs": 25, "batch_size": 32, "lr": 1e-3}
FULL |= {"schedule": "onecycle", "patience": None, "max_minutes": 90.0, "num_workers": 2}
FULL |= {"hours": None}  # of a session; None is 11 of Kaggle's 12, and no limit elsewhere
# Which defences that see no attack, and their numbers
FULL |= {"defences": ("lipschitz", "lipschitz_operator", "margin_gradient")}
FULL["defences"] += ("distilled", "papernot")
FULL |= {"lipschitz_penalty": 0.05, "gradient_penalty": 3e-3, "temperatures": (35.0, 50.0)}
FULL |= {"alpha": 0.9}
# Adversarial training: which, on what ball
FULL |= {"adversarial": ("pgd_at", "fast_at", "free_at", "trades", "mart", "hat", "gairat")}
FULL |= {"at_eps": 4 / 255, "at_steps": 7, "at_step_size": 1.5 / 255}
# "free" makes free_epochs / free_replays passes and replays every batch; gairat goes on from pgd_at
FULL |= {"free_replays": 4, "free_epochs": 60, "gairat_epochs": 10, "gairat_steps": 10}
# What pgd_at_long, pgd_at_ema, pgd_at_awp and their mixtures add to pgd_at
FULL |= {"long_epochs": 60, "ema": 0.995, "awp_gamma": 5e-3}
# Noise, and the certificate that it allows
FULL |= {"sigma": 0.12, "certified_per_class": 100, "certificate_draws": 1000}

# %% tags=["settings"]
# The attacks: add or leave out; their budgets; the eps at which expensive ones run, if not at all.
# full_at: the eps where every attack meets every image; most: attacks that meet so many at most;
# attack_batch None: as many images at once as fit in memory
FULL |= {"attacks": evaluate.SUITE, "eps_grid": pixel_eps(0.25, 0.5, 1, 2, 4, 8)}
FULL |= {"headline_eps": 4 / 255, "full_at": 4 / 255, "most": {"square": 200}}
FULL |= {"published_eps_grid": (0.005, 0.01, 0.03, 0.05, 0.08, 0.1)}  # of FGSM, normalised units
FULL |= {"pgd_steps": 20, "pgd_restarts": 2, "attack_batch": None}
FULL |= {"budgets": {"square": {"steps": 2000}}}
FULL |= {"expensive": {"square": pixel_eps(4)}, "check_images": 100}
# One-Pixel: (pixels, population, iterations, F, CR) of the study that is redone here
FULL |= {"one_pixel": ((1, 60, 120, 0.5, 0.9), (1, 200, 120, 0.7, 1.0), (3, 60, 120, 0.5, 1.0))}
FULL |= {"one_pixel_per_class": 100, "bootstrap_draws": 2000}
FULL |= {"seed_runs": ()}  # names of runs under other seeds, for section 7

# %% tags=["settings"]
CPU = {"size": 112, "epochs": 5, "num_workers": 0, "at_steps": 2, "at_step_size": 2.8 / 255}
CPU |= {"free_epochs": 20, "gairat_epochs": 2, "gairat_steps": 5, "certified_per_class": 40}
CPU |= {"long_epochs": 20, "eps_grid": pixel_eps(0.5, 1, 2, 4), "pgd_steps": 10}
CPU |= {"pgd_restarts": 1, "budgets": {"fmn": {"steps": 30}, "square": {"steps": 2000}}}
CPU |= {"one_pixel_per_class": 8}

# %% tags=["settings"]
TINY = {name: {"steps": 4} for name in ("apgd_ce", "apgd_margin", "deepfool", "fmn")}
TINY |= {"noise": {"draws": 4}, "square": {"steps": 6}}
SMOKE = {"size": 48, "per_class": 88, "width": 0.5, "stages": 3, "pretrained": "phantom"}
SMOKE |= {"epochs": 9, "batch_size": 16, "lr": 2e-3, "num_workers": 0, "max_minutes": None}
SMOKE |= {"temperatures": (50.0,), "gradient_penalty": 1e-4, "sigma": 0.05}
SMOKE |= {"adversarial": ("pgd_at", "trades"), "at_steps": 2, "at_step_size": 2.8 / 255}
SMOKE |= {"eps_grid": pixel_eps(1, 4), "published_eps_grid": (0.01, 0.1)}
SMOKE |= {"pgd_steps": 3, "pgd_restarts": 1, "budgets": TINY, "most": {"square": 20}}
SMOKE |= {"long_epochs": 12, "check_images": 4, "certified_per_class": 4, "certificate_draws": 200}
SMOKE |= {"one_pixel": ((1, 10, 3, 0.5, 0.9), (1, 20, 3, 0.7, 1.0), (3, 10, 3, 0.5, 1.0))}
SMOKE |= {"one_pixel_per_class": 4, "bootstrap_draws": 200}
OTHER = {"test_share": 0.15, "unusable_share": 0.01}  # other data: a test split is drawn

# %% tags=["start"]
from dlia_utils.run import start

added = "long ema awp long_ema long_awp ema_awp long_ema_awp".split()
allowed = {name: FULL[name] for name in ("attacks", "defences", "adversarial")}
allowed["adversarial"] += tuple(f"pgd_at_{one}" for one in added)
run = start(
    "01_pneumonia_robustness",
    dict(full=FULL, cpu=CPU, smoke=SMOKE),
    dict(profile=PROFILE, data_dir=DATA_DIR, run_name=RUN_NAME, resume=RESUME, changes=CHANGES),
    by_data={"pneumonia": {}, "*": OTHER},
    own_data=2,
    allowed=allowed | {"pretrained": ("phantom",)},
    trains="3 Training",
)
print(run)

# %% tags=["imports"]
import warnings
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from scipy.special import expit
from sklearn.metrics import roc_curve

from dlia_utils import calibration, files, launch, metrics, models, objectives, plots, report
from dlia_utils import plan, smoothing, suite, train
from dlia_utils.attacks import checklist, evaluate, fgsm, normalised_eps, one_pixel, pgd
from dlia_utils.data import datasets, split
from dlia_utils.models.mobilenet import IMAGENET_STD
from dlia_utils.models.pixel import fast_copy
from dlia_utils.study import load_models, made_by, open_study, stored
from dlia_utils.study import test_opened, train_model, weights_label
from dlia_utils.units import eps_text

RESULTS = run.run_dir / "results.csv"

# %% [markdown]
# **Your model here.** One line puts any network with two logits into every table below: a function that *builds* one
# (it is trained here, like the baseline), or a network that is *trained already*. Networks expect normalised images;
# attacks think in grey levels. `models.wrap` settles that: images enter in [0, 1], the normalisation is part of the
# model, and 4/255 means four grey levels. `models.backbone` does it for any name of torchvision or timm.

# %% tags=["yours"]
# run.own["resnet18"] = lambda: models.backbone("resnet18", num_classes=2, pretrained=False)
# run.own["mine"] = models.wrap(my_network, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
several = {"distilled": [f"distilled_T{t:g}" for t in run.temperatures]}
MODELS = ["baseline", *(one for name in run.defences for one in several.get(name, [name]))]
MODELS += [*run.adversarial, *run.own]
JUDGE_STEPS = min(10, run.pgd_steps)  # of the attack that chooses an adversarial training's epoch


# %% [markdown]
# **What the sections share**: the last row of their tables, which is what always giving the more frequent answer scores.
# No attack can change that, so a model below it is worth less than none. And the test images for expensive attacks.

# %% tags=["yours"]
def attack_subset(study, per_class):
    """A fixed, class-balanced sample of test rows, for attacks too expensive for all."""
    rng, test = np.random.default_rng(run.seed), study.rows("test")
    labels, classes = study.labels(test).cpu().numpy(), range(len(study.dataset.classes))
    drawn = [rng.permutation(test[labels == label])[:per_class] for label in classes]
    return np.sort(np.concatenate(drawn))


# %% tags=["yours"]
def beside_constant(table, labels):
    """A table of models and metrics (other columns are accuracies) with that last row."""
    healthy, sick = np.bincount(labels, minlength=2)
    known = dict.fromkeys(("precision", "recall", "f1")) | {"auc": 0.5, "balanced_accuracy": 0.5}
    known |= {"sensitivity": float(sick > healthy), "specificity": float(sick <= healthy)}
    share, digits = max(healthy, sick) / len(labels), metrics.digits_of(len(labels))
    row = [known.get(name, share) for name in table]
    row = ["" if one is None else f"{one:.{digits}f}" for one in row]
    table.loc["always the same answer"] = row
    return table


# %% [markdown]
# **What this will cost.** Before hours are spent: each phase with the passes of images that the settings ask for, counted
# from these alone, and the time that they take here, measured on a few random batches and, for the trainings, on images
# read and augmented. *At most* counts an attack as if it fooled nobody, and a training as if it never stopped early. Left
# out are figures of a few images, models of your own, and what the CPU does with maps and tables. A run that has a
# budget (`hours`; on Kaggle 11 of the session's 12) ends between two phases or epochs before it is cut off, and goes on
# in the next session. `python -m dlia_utils plan --nb 01 --profile full --device t4` tells the same of Kaggle's GPUs
# beforehand. The cells that count are folded.

# %% tags=["plan"]
study, net = open_study(run), "MobileNetV2"
make = partial(models.mobilenet_v2, width=run.width, stages=run.stages)
networks = {net: plan.Network(make, run.size, run.batch_size)}
sizes = {part: len(study.rows(part)) for part in ("train", "val", "test")}

# %% tags=["plan"]
OBJECTIVES = {"baseline": "cross_entropy", "papernot_teacher": "cross_entropy_at"}
OBJECTIVES |= {"gaussian_noise": "gaussian_noise", "papernot": "distillation"}
OBJECTIVES |= dict.fromkeys(several["distilled"], "distillation")
OBJECTIVES |= dict.fromkeys(("lipschitz", "lipschitz_operator"), "lipschitz")
OBJECTIVES |= {"margin_gradient": "margin_gradient", "fast_at": "fast_adversarial"}
OBJECTIVES |= {"free_at": "free_adversarial"} | {n: n for n in ("trades", "mart", "hat", "gairat")}

# %% tags=["plan"]
how = dict(batch=run.batch_size, val=sizes["val"], exact=run.patience is None)
plain = [name for name in MODELS if name not in run.adversarial and name not in run.own]
teachers, phases = ["papernot_teacher"] if "papernot" in MODELS else [], []
for name in [*plain, *teachers, "gaussian_noise"]:
    given = ("trainings", net, sizes["train"], run.epochs)
    told = dict(objective=OBJECTIVES[name], settings="defences epochs size", job=name)
    phases += plan.training(*given, **how, **told)

# %% tags=["plan"]
judge = suite.judging(sizes["val"], steps=JUDGE_STEPS)
for name in run.adversarial:
    parts, epochs, steps, replays = name.split("_"), run.epochs, run.at_steps, 1
    usual = "pgd_awp" if "awp" in parts else "pgd_adversarial"
    epochs = run.long_epochs if "long" in parts else epochs
    if name == "free_at":
        epochs, steps, replays = run.free_epochs // run.free_replays, 0, run.free_replays
    if name == "gairat":
        epochs, steps = run.gairat_epochs, run.gairat_steps
    asked = judge
    if name == "fast_at":  # and its watch for overfitting: one step, and ten of PGD
        steps, asked = 1, (2 * judge[0], 3 * judge[1])
    given = ("trainings on attacks", net, sizes["train"], epochs)
    told = dict(objective=OBJECTIVES.get(name, usual), steps=steps, replays=replays, judge=asked)
    told |= dict(settings="adversarial epochs at_steps size", job=name)
    phases += plan.training(*given, **how, **told)

# %% tags=["plan"]
asked = [name for name in MODELS if name not in run.own]
phases += suite.phases(run, asked, sizes["test"], net)
clean = len(asked) * (3 * sizes["test"] + 2 * sizes["val"])  # sections 4 and 8
phases.append(plan.Phase("clean images", net, sizes["test"], clean))

# %% tags=["plan"]
fgsms = len(asked) * len(run.published_eps_grid) * sizes["test"]
told = dict(settings="published_eps_grid")
phases.append(plan.Phase("FGSM, normalised", net, sizes["test"], 2 * fgsms, fgsms, **told))
count = min(2 * run.certified_per_class, sizes["test"])
noisy, told = count * (100 + run.certificate_draws), dict(settings="certified_per_class")
phases.append(plan.Phase("certificate", net, count, noisy, **told))

# %% tags=["plan"]
count, queries = min(2 * run.one_pixel_per_class, sizes["test"]), 0
for pixels, population, iterations, *_ in run.one_pixel:
    own = dict(pixels=pixels, population=population, iterations=iterations)
    queries += 2 * count * (2 + evaluate.passes("one_pixel", own)[0])  # two models, and looked at
told = dict(exact=False, settings="one_pixel one_pixel_per_class")
phases.append(plan.Phase("One-Pixel", net, count, queries, **told))
loader = study.torch_set("train", augmented=True)

# %%
prices = plan.measured(networks, run.device, loader)
cost = plan.table(networks, phases, prices, gpus=torch.cuda.device_count() or 1)
print(plan.advice(cost, run.budget))
report.show(cost, digits=3)


# %% [markdown]
# ## 1 One attack
#
# Before anything else, break a network. First a plain classifier, trained with cross-entropy; it weighs both classes the
# same although there are three pneumonias to each healthy chest. It is the *baseline* of everything that follows.

# %%
def train_baseline(study):
    return train_model(study, "baseline", objectives.cross_entropy(weight=study.class_weights()))


study = open_study(run)
fitted = train_baseline(study)
print("starting weights:", weights_label(run))
report.show(fitted.history.tail(3)[["epoch", "train_loss", "val_accuracy", "val_auc"]])


# %% [markdown]
# **The idea.** Training asks how the *weights* should change so that the loss falls. An attack asks how the *image* should
# change so that the loss rises, and may move each pixel by at most eps. The best use of that budget, if the loss were a
# straight line, is eps in the direction of each pixel's gradient sign: the *fast gradient sign method* (FGSM; Goodfellow,
# Shlens and Szegedy, *Explaining and Harnessing Adversarial Examples*, 2015,
# [1412.6572](https://arxiv.org/abs/1412.6572)). Here it is, whole. Images are floats in [0, 1], so eps = 4/255 means:
# four of 255 grey levels.

# %%
def first_attack(model, x, y, eps):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    return (x.detach() + eps * gradient.sign()).clamp(0, 1)


# %% [markdown]
# How many *validation* images does the baseline still read correctly? (The test images stay closed until section 4.)
# Random noise of the same size is the control: it is the direction that does it, not the amount.

# %%
study = open_study(run)
model, (x, y) = load_models(study, ["baseline"])["baseline"], suite.held_out(study)
rows, generator = [], torch.Generator().manual_seed(run.seed)
signs = torch.randn(x.shape, generator=generator).sign().to(x.device)
for k in (0, 1, 2, 4, 8):
    noisy, attacked = (x + k / 255 * signs).clamp(0, 1), first_attack(model, x, y, k / 255)
    right = [(model(z).argmax(1) == y).float().mean().item() for z in (noisy, attacked)]
    rows.append(
        {"eps": f"{k}/255", "right after noise": right[0], "right after the attack": right[1]}
    )
always = f"always the same answer: {y.bincount().max() / len(y):.2f}"
report.show(pd.DataFrame(rows), notes=f"{len(x)} validation images, {always}; {run.caption}")

# %%
chosen = torch.stack([(y == label).nonzero()[0, 0] for label in (0, 1)])
x, y = x[chosen], y[chosen]
attacked = first_attack(model, x, y, run.headline_eps)
change = 0.5 + (attacked - x) / (2 * run.headline_eps)
titles, classes = [], study.dataset.classes
for label, *images in zip(y.tolist(), x, attacked, strict=True):
    answers = [model(image[None]).softmax(1)[0] for image in images]
    before, after = [f"read as\n{classes[p.argmax()]} {p.max():.2f}" for p in answers]
    titles += [f"{classes[label]}, {before}", f"attacked, {after}", "the change"]
shown = torch.stack([x, attacked, change], 1).flatten(0, 1).cpu()
figure = plots.figure_samples(shown, titles, run.caption, columns=3)
report.save_figure(figure, run, "first_attack")
figure

# %% [markdown]
# *What to see in the table.* The attacked accuracy falls fast, that under noise does not. At a large eps a single step may
# overshoot and do less than a smaller one: the loss is no straight line. *In the figure* the middle image looks like the
# left one; the answers above them need not agree. On the right is the change itself, stretched so that black is eps darker,
# white eps brighter, and grey unchanged: not one pixel moves more than eps.

# %% [markdown]
# **What we learnt.** One gradient is enough to find a direction to which a plain network is helplessly sensitive; random
# noise of the same size does far less. Stronger attacks take several small steps; section 5 has them. First the data.

# %% [markdown]
# ## 2 The data
#
# The published archive has three traps that most public notebooks fall into: a complete second copy of the data inside
# itself (`chest_xray/chest_xray`), thousands of `._*` files that look like images, and a validation folder of **16**
# images, on which a model's accuracy moves in steps of 6 %. The loader counts the junk and never reads an image twice.
# *(Kermany et al., Identifying Medical Diagnoses and Treatable Diseases by Image-Based Deep Learning, Cell 2018.)*

# %%
study = open_study(run)
print(f"{len(study.cache.truncated)} files end too early but decode: they are used")
display(report.show(datasets.summary(study.dataset)))
report.show(study.dataset.ignored["reason"].value_counts().rename("files not read"))

# %% [markdown]
# **The split.** The official test folder stays as it is. Validation is drawn again from train and val together: whole
# patients, classes in proportion. Patients are read from the file names (`person17_bacteria_52`, `IM-0115-0001`,
# `NORMAL2-IM-0052-0001`). Without that rule another image of the same chest would sit on both sides, and the model could
# recognise the patient instead of the disease.
#
# The audit also looks for byte-identical files. Read its *detail* column: the archive reuses person numbers between train
# and test, and only the numbers together with the kind of infection keep them apart.

# %%
report.show(split.audit(study.dataset))

# %% [markdown]
# **What the model sees.** Each image is decoded once to one grey channel, squashed to a square (as in the original study)
# and kept as a memory-mapped array. From here on an image is a float in [0, 1] with *one* channel: a radiograph is grey,
# so an attack that paints red and blue pixels would not be a radiograph.

# %%
labels = study.labels(study.rows("train")).cpu().numpy()
shown = np.concatenate([study.rows("train")[labels == c][:6] for c in (0, 1)])
titles = study.dataset.manifest.loc[shown, ["class_name", "patient"]].agg("\n".join, axis=1)
figure = plots.figure_samples(study.images(shown).cpu().numpy(), titles, run.caption)
report.save_figure(figure, run, "samples")
figure


# %% [markdown]
# *What to see.* Pneumonia shows as bright, cloudy patches in the dark lung fields. The name below each class is the
# patient: several images may share one.

# %% [markdown]
# **What we learnt.** Count what is there before training: copies, junk files and patients decide what a test score means.

# %% [markdown]
# ## 3 Training
#
# All models share one recipe (Adam; flips, small rotations, shifts and zooms, changes of exposure and sharpness, the same
# for both classes) and differ only in the loss. A run that is cut off goes on from its last finished epoch. Each cell
# below defines one defence in a few lines; the last one trains them all.
#
# **Lipschitz models.** A network whose output changes slowly cannot be moved far by a small change. Spectral
# normalisation divides every convolution and linear layer by (an estimate of) its largest singular value, and a penalty
# $\lambda\,\|\nabla_x \max_k p_k(x)\|_2^2$ with $\lambda = 0.05$ flattens the output around each image (gradient in
# the normalised units of the original study). Two remarks before you trust the name: the original study takes the norm
# of the *reshaped* kernel, a matrix `[out, in*kh*kw]`, which is not the norm of the convolution; `lipschitz_operator`
# does it properly, by power iteration on the convolution itself. And batch normalisation multiplies either right back.

# %%
def train_lipschitz(study, name, kind):
    options = {"input_std": IMAGENET_STD, "weight": study.class_weights()}
    penalised = objectives.lipschitz(penalty=run.lipschitz_penalty, **options)
    return train_model(study, name, penalised, spectral=kind)


# %% [markdown]
# **A penalty on the margin.** A flat softmax can also be had by large logits: where $p = 1$ to all digits its gradient is
# zero. So `margin_gradient` penalises the gradient of the logit margin $z_{right} - z_{wrong}$ itself (after Drucker and
# LeCun, *Improving Generalization Performance Using Double Backpropagation*, 1992, and Ross and Doshi-Velez, *Improving
# the Adversarial Robustness and Interpretability of Deep Neural Networks by Regularizing Their Input Gradients*, 2018,
# [1711.09404](https://arxiv.org/abs/1711.09404)).

# %%
def train_margin_gradient(study):
    flat = objectives.margin_gradient(penalty=run.gradient_penalty, weight=study.class_weights())
    return train_model(study, "margin_gradient", flat)


# %% [markdown]
# **Distillation as published in the study we redo.** The teacher is the baseline; the student learns
# $\alpha\,T^2\,\mathrm{KL}(p_T^{teacher} \| p_T^{student}) + (1-\alpha)\,\mathrm{CE}$ with $\alpha = 0.9$ at
# temperature $T = 35$ and $T = 50$ (KL: the Kullback-Leibler divergence, CE: cross-entropy). This is the knowledge
# distillation of Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, 2015.

# %%
def train_distilled(study, temperature):
    teacher = load_models(study, ["baseline"])["baseline"]
    student = objectives.distillation(teacher, temperature=temperature, alpha=run.alpha)
    return train_model(study, f"distilled_T{temperature:g}", student)


# %% [markdown]
# **Distillation as Papernot defined it** (Papernot et al., *Distillation as a Defense to Adversarial Perturbations against
# Deep Neural Networks*, 2016, [1511.04508](https://arxiv.org/abs/1511.04508)). The difference is where the temperature
# sits: the *teacher itself* is trained at $T$, the student at the same $T$, and both are deployed at $T = 1$. To make
# probabilities sharp after division by 50, the logits must grow about fifty-fold. Remember this in section 6.

# %%
def train_papernot_teacher(study):
    hot_loss = objectives.cross_entropy_at(max(run.temperatures), weight=study.class_weights())
    return train_model(study, "papernot_teacher", hot_loss)


def train_papernot(study):
    teacher = load_models(study, ["papernot_teacher"])["papernot_teacher"]
    student = objectives.distillation(teacher, temperature=max(run.temperatures), alpha=1.0)
    return train_model(study, "papernot", student)


# %% [markdown]
# **Noise.** Gaussian noise on every training image, the training for randomised smoothing (Cohen, Rosenfeld and Kolter,
# *Certified Adversarial Robustness via Randomized Smoothing*, 2019, [1902.02918](https://arxiv.org/abs/1902.02918)). This
# network is only ever asked about *noisy* images, so its best epoch is chosen on noisy validation images, and it has no
# place among the models that read clean ones. Section 10 turns it into a classifier with a certificate.

# %%
def train_gaussian_noise(study):
    x, y = suite.held_out(study)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(run.seed)).to(x.device)

    def under_noise(model):
        called = train.log_odds(model, x + run.sigma * noise) > 0
        return {"val_noisy_accuracy": float((called == (y.cpu().numpy() == 1)).mean())}

    noisy = objectives.gaussian_noise(sigma=run.sigma, weight=study.class_weights())
    chosen = {"val_metric": under_noise, "monitor": "val_noisy_accuracy"}
    return train_model(study, "gaussian_noise", noisy, **chosen)


# %% [markdown]
# **Adversarial training.** Attack every batch first, then learn from the attacked images. The idea, with the attack of section 1:

# %%
def adversarial_loss(model, x, y, eps=4 / 255):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    attacked = (x.detach() + eps * gradient.sign()).clamp(0, 1)
    return F.cross_entropy(model(attacked), y)


# %% [markdown]
# One large step is too weak an opponent (the network learns to fool the attack); *projected gradient descent* (PGD) takes
# several small ones. The family:
#
# | name | what it learns from | paper |
# |---|---|---|
# | `pgd_at` | images under a few PGD steps, with their true labels | Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, 2018, [1706.06083](https://arxiv.org/abs/1706.06083) |
# | `fast_at` | one large step from a random start; watched for catastrophic overfitting | Wong, Rice and Kolter, *Fast Is Better than Free*, 2020, [2001.03994](https://arxiv.org/abs/2001.03994) |
# | `free_at` | one backward pass that serves weights and attack at once, several times per batch | Shafahi et al., *Adversarial Training for Free!*, 2019, [1904.12843](https://arxiv.org/abs/1904.12843) |
# | `trades` | clean images, plus the distance between clean and attacked answers | Zhang et al., *Theoretically Principled Trade-off between Robustness and Accuracy*, 2019, [1901.08573](https://arxiv.org/abs/1901.08573) |
# | `mart` | attacked images; those that are wrong when clean must be stable most of all | Wang et al., *Improving Adversarial Robustness Requires Revisiting Misclassified Examples*, 2020 |
# | `hat` | as TRADES, with a helper image beyond the attacked one that keeps the border from moving too far | Rade and Moosavi-Dezfooli, *Reducing Excessive Margin to Achieve a Better Accuracy vs. Robustness Trade-off*, 2022 |
# | `gairat` | `pgd_at`, continued with large weights for images near the border | Zhang et al., *Geometry-aware Instance-reweighted Adversarial Training*, 2021, [2010.01736](https://arxiv.org/abs/2010.01736) |
#
# Three cheap additions to `pgd_at` can be asked for by name, such as `pgd_at_ema` or `pgd_at_long_ema_awp`: `long` trains
# for more epochs; `ema` judges and keeps a moving average of the weights; `awp` attacks the *weights*, too: each layer is
# moved up the loss by a small share of its own size before the gradient is taken, so that the loss found is flat as well
# as low (Wu, Xia and Wang, *Adversarial Weight Perturbation Helps Robust Generalization*, 2020,
# [2004.05884](https://arxiv.org/abs/2004.05884)).

# %%
def adversarial_objective(study, name):
    ball = {"eps": run.at_eps, "weight": study.class_weights()}
    steps = {**ball, "steps": run.at_steps, "step_size": run.at_step_size}
    if name == "fast_at":
        return objectives.fast_adversarial(**ball)
    if name == "free_at":
        return objectives.free_adversarial(**ball, replays=run.free_replays)
    if name == "gairat":
        size = 2 * run.at_eps / run.gairat_steps
        return objectives.gairat(**ball, steps=run.gairat_steps, step_size=size)
    if name == "hat":
        return objectives.hat(load_models(study, ["baseline"])["baseline"], **steps)
    if "awp" in name.split("_"):
        return objectives.pgd_awp(gamma=run.awp_gamma, **steps)
    makers = {"trades": objectives.trades, "mart": objectives.mart}
    return makers.get(name, objectives.pgd_adversarial)(**steps)


# %% [markdown]
# **Which epoch is kept?** For these models the one with the highest balanced validation accuracy, half of it clean and
# half *under attack*. By clean accuracy alone it would be the least robust epoch; by attacked accuracy alone it might be
# one that answers "pneumonia" to everything, which no attack can change.
#
# Fast training is watched besides: a network may learn to withstand its one large step and nothing else. Where a gap above
# 0.2 opens in its `metrics.csv` between the accuracy under one step and that under ten, it has (*catastrophic overfitting*).

# %%
def one_step_or_ten(study, model):
    """Accuracy on validation images under one large step and under ten of PGD."""
    how = dict(attacks=("fgsm", "pgd_ce"), in_full=None, batch_size=run.attack_batch)
    found = evaluate.robust(model, suite.held_out(study), [run.at_eps], **how, progress=False)
    right = 1 - found.rows.groupby("attack")["fooled"].mean()
    row = {"val_single_step_accuracy": right["fgsm"], "val_pgd_accuracy": right["pgd_ce"]}
    return row | {"val_overfitting_gap": right["fgsm"] - right["pgd_ce"]}


# %%
def train_adversarial(study, name):
    options = suite.choose_under_attack(study, steps=JUDGE_STEPS)
    if name == "fast_at":
        judge = options["val_metric"]
        options["val_metric"] = lambda model: one_step_or_ten(study, model) | judge(model)
    if name == "free_at":
        options["epochs"] = run.free_epochs // run.free_replays  # as the paper counts
    options |= {"epochs": run.long_epochs} if "long" in name.split("_") else {}
    options |= {"ema": run.ema} if "ema" in name.split("_") else {}
    if name == "gairat":
        options |= {"start": "pgd_at", "epochs": run.gairat_epochs, "lr": run.lr / 4}
    return train_model(study, name, adversarial_objective(study, name), **options)


# %% [markdown]
# **Train them**, teachers before their students. A model of your own learns what the baseline learns; one that is trained
# already is taken as it is. `launch.each` is a loop on a laptop; with two GPUs it trains two models at a time. Models
# already trained are read back.

# %%
def train_plain(study, name):
    return train_model(study, name, objectives.cross_entropy(weight=study.class_weights()))


jobs = {"baseline": partial(train_plain, name="baseline")}
jobs |= {"papernot_teacher": train_papernot_teacher, "margin_gradient": train_margin_gradient}
jobs |= {"gaussian_noise": train_gaussian_noise}
jobs["lipschitz"] = partial(train_lipschitz, name="lipschitz", kind="kernel")
jobs["lipschitz_operator"] = partial(train_lipschitz, name="lipschitz_operator", kind="operator")
jobs |= {name: partial(train_adversarial, name=name) for name in run.adversarial}
jobs |= {name: partial(train_plain, name=name) for name in run.own}
students = {f"distilled_T{t:g}": partial(train_distilled, temperature=t) for t in run.temperatures}
students |= {"papernot": train_papernot}
students |= {name: jobs.pop(name) for name in ("hat", "gairat") if name in jobs}
wanted = {*MODELS, "gaussian_noise", *(["papernot_teacher"] if "papernot" in MODELS else [])}

# %%
study = open_study(run)
fitted, logs = {}, run.run_dir / "logs"
for wave in (jobs, students):
    names = [name for name in wave if name in wanted]
    how = dict(log_dir=logs, cost=lambda name: name in run.adversarial)  # these take longest
    fitted |= launch.each(lambda name, wave=wave: wave[name](study), names, **how)
report.show(report.trainings(fitted), digits=3)

# %%
paths = {name: run.run_dir / name / "metrics.csv" for name in MODELS}
histories = {name: pd.read_csv(path) for name, path in paths.items() if path.exists()}
figure = plots.figure_history(histories, run.caption)
report.save_figure(figure, run, "training")
figure

# %% [markdown]
# *What to see.* Each loss has its own scale on the left (a distillation loss is not a cross-entropy). Validation AUC on
# the right (AUC: the area under the ROC curve, the chance that a random pneumonia ranks above a random healthy chest) is
# comparable: adversarial training learns more slowly, and gives up a little.
#
# **What did spectral normalisation do to the norms?** For every convolution: the norm of the reshaped kernel beside that
# of the convolution itself, at the size of its input. Neither bounds the whole network: the gains of its batch
# normalisations come on top.

# %%
study = open_study(run)
rows = {}
names = [name for name in ("baseline", "lipschitz", "lipschitz_operator") if name in MODELS]
for name, model in load_models(study, names).items():
    norms = models.compare_norms(model.backbone, (3, run.size, run.size)).query("kind == 'Conv2d'")
    rows[name] = norms[["reshaped_norm", "operator_norm", "ratio"]].max().add_prefix("largest ")
report.show(pd.DataFrame(rows).T.rename_axis("model"))

# %% [markdown]
# **What we learnt.** A defence is a change of the loss, a few lines each. A name is not a guarantee: the "spectral norm" of
# a reshaped kernel is not that of its convolution, and the ratio shows by how much.

# %% [markdown]
# ## 4 The clean test
#
# The test split is opened here, after every choice has been made, and each opening is logged. The intervals come from a
# bootstrap over *patients*, since two images of one child are not two independent pieces of evidence: patients are drawn
# with replacement some thousand times, and the middle 95 % of the metric is the interval. Always answering "pneumonia" is
# right on the share printed first: no accuracy means anything without it.

# %%
study = open_study(run)
trained, rows = load_models(study, MODELS), study.rows("test")
test_opened(study, "clean metrics of all models")
labels, patients = study.labels(rows).cpu().numpy(), study.patients(rows)
print(f"always answering {study.dataset.classes[1]!r}: {labels.mean():.3f} of {len(rows)} images")
scores = {name: train.log_odds(model, study.torch_set("test")) for name, model in trained.items()}
options, clean = {"threshold": 0, "draws": run.bootstrap_draws}, []
for name, score in scores.items():
    found = metrics.classification(labels, score, patients, **options)
    clean.append(report.result_rows(found, run, model=name))
clean = pd.concat(clean)
report.update_results(clean, RESULTS)
shown = "balanced_accuracy auc accuracy sensitivity specificity precision recall f1".split()
table = report.wide(clean, only=shown, intervals=shown[:2])
report.show(beside_constant(table, labels))

# %% [markdown]
# *Sensitivity* is the share of pneumonias found; *specificity* the share of healthy chests left alone; *balanced accuracy*
# their mean, 0.5 for a constant answer. Precision, recall and F1 are macro averages over both classes, as in the original
# study. Images are ranked by the log-odds $z_1 - z_0$, not by the probability: above a difference of 37 that is 1 to all
# digits, and a model with large logits would lose its ranking, and so its AUC, to rounding.
#
# **Does a defence cost AUC?** DeLong's test compares two AUCs on the same images (DeLong et al., *Comparing the Areas
# under Two or More Correlated Receiver Operating Characteristic Curves*, 1988), here by patient. Thirteen comparisons
# would find something by chance, so p is adjusted by Holm's method (Holm, *A Simple Sequentially Rejective Multiple Test
# Procedure*, 1979).

# %%
predictions = study.dataset.manifest.loc[rows, ["path", "label"]]
predictions = predictions.assign(**{name: expit(score) for name, score in scores.items()})
files.write_csv(predictions, run.run_dir / "predictions.csv")
base = scores["baseline"]
tests = {n: metrics.delong_test(labels, scores[n], base, patients) for n in MODELS[1:]}
tests = pd.DataFrame(tests).T.rename(columns={"value": "AUC minus the baseline's"})
tests["p (Holm)"] = metrics.holm(tests["p"])
told = tests.rename_axis("model").reset_index().assign(**report.origin(run))
files.write_csv(told, run.run_dir / "auc_tests.csv")
shown = tests[["AUC minus the baseline's", "ci_low", "ci_high", "p (Holm)"]].astype(float)
report.show(shown.rename_axis("model"), digits=3)

# %%
figure = plots.figure_roc(labels, scores, run.caption)
report.save_figure(figure, run, "roc")
figure

# %% [markdown]
# *What to see.* On clean images the curves lie close together: clean accuracy does not tell a robust model from a fragile
# one.

# %%
predicted = {name: (score > 0).astype(int) for name, score in scores.items()}
figure = plots.figure_confusion(labels, predicted, study.dataset.classes, run.caption)
report.save_figure(figure, run, "confusion")
figure


# %% [markdown]
# *What to see.* The lower left field is what matters in a clinic: pneumonias called normal. A row that holds 0 % and 100 %
# would be a model that gives everybody the same answer.

# %% [markdown]
# **What we learnt.** On clean images the defences cost little, or nothing that this test split can show. Whether they
# bought anything is another question.

# %% [markdown]
# ## 5 The suite
#
# Three things make a robust accuracy believable:
#
# 1. **Strong attacks of several kinds**, since each finds images that the others miss.
# 2. **The worst case per image**: an image counts as right only if *no* attack fooled it at this or a smaller eps. Images
#    that are wrong before any attack count as fooled. The worst case is below the best single attack.
# 3. **A unit that means something**: grey levels of 255, and the model owns its normalisation.
#
# | attack | how it searches | source |
# |---|---|---|
# | `noise` | random signs: the control | |
# | `fgsm` | one step along the gradient's sign | Goodfellow et al., 2015 |
# | `pgd_ce`, `pgd_margin` | many small steps from a random start, up the cross-entropy or the margin of the logits; of two classes both climb alike, so the pair is two starts, and differs where the softmax saturates | Madry et al., 2018 |
# | `apgd_ce`, `apgd_margin` | PGD with momentum and a step size that halves itself | Croce and Hein, *Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks*, 2020, [2003.01690](https://arxiv.org/abs/2003.01690) |
# | `deepfool` | straight to the nearest decision border | Moosavi-Dezfooli et al., *DeepFool*, 2016 |
# | `fmn` | shrinks the ball while it stays fooled | Pintor et al., *Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints*, 2021 |
# | `square` | random squares, sees only the answers, no gradient | Andriushchenko et al., *Square Attack*, 2020 |
#
# **Where the passes go.** A ball holds the smaller ones. So every attack meets every image at one eps first, the headline's
# (`full_at`); in smaller balls only what fell there is attacked, in larger ones only what stood, and an image that is
# fooled leaves. The worst case has all attacks at every eps, for a third of the passes. Square comes last, at the headline
# eps alone (`expensive`), against at most so many images as `most` says: of those that no gradient moved, the ones
# nearest to the border. It can only lower the worst case. Shorten or extend the list of attacks by `attacks`.

# %%
def cost_of(name):
    return suite.attack(open_study(run), name).cost.assign(model=name)


study = open_study(run)
test_opened(study, "the suite of attacks in pixel units")
cost = pd.concat(launch.each(cost_of, MODELS, log_dir=run.run_dir / "logs").values())
saved = files.write_csv(cost, run.run_dir / "suite_cost.csv")

# %%
for name in MODELS:
    per_image = stored(study, f"robust_{name}", model=name, section="5 The suite")
    falls = report.direction_rows(per_image, study, model=name, eps=run.headline_eps)
    rows = pd.concat([report.accuracy_rows(per_image, study, model=name), falls])
    results = report.update_results(rows, RESULTS)
labels = study.labels(study.rows("test")).cpu().numpy()
table = report.results_table(results[results.attack.isin(["clean", "worst"])])
report.show(beside_constant(table, labels))

# %%
answers = np.bincount(labels)
options = {"attack": "worst", "constant": answers.max() / answers.sum()}
options["told_at"] = run.headline_eps
figure = plots.figure_accuracy_vs_eps(results, run.caption, note="Worst case", **options)
report.save_figure(figure, run, "worst_case")
figure

# %% [markdown]
# *What to see.* Follow the baseline down. A model below the dotted line would do better by always giving the same answer,
# so only what stays above it is worth having. Bands are 95 % intervals by patient.
#
# **Each attack by itself** at the headline eps, all over the same images. Read across a row: noise should hurt least, the
# iterative attacks at least as much as FGSM, and the worst case lies below them all. Where it is otherwise, something is
# wrong with the attack, not right with the model. Below stands the black box by itself: the share of the images that it
# was tried on (all of which had stood until then) that still stand. Much below 1, gradients have missed something.

# %%
near = results[np.isclose(results.eps, run.headline_eps) & results.eps_unit.eq("pixel")]
near = near[near.metric.eq("accuracy")]
table = report.wide(near, "attack", only=[*run.attacks, "worst"], intervals=["worst"])
display(report.show(beside_constant(table, labels)))
last = near[near.attack.str.endswith(evaluate.STANDING)]
report.show(report.wide(last, "attack", down=["model", "n"]))

# %% [markdown]
# **In which direction does it fall?** A missed pneumonia and a false alarm are not the same mistake: the worst case, split
# into the share of pneumonias still found (sensitivity) and of healthy chests still left alone (specificity). Their mean,
# the *balanced* worst case, is 0.5 for a constant answer whatever the classes' shares: what lies below it is worth less
# than no model. Below the table stands what the suite cost: forward and backward passes of one image.

# %%
falls = results[results.attack.eq("worst") & np.isclose(results.eps, run.headline_eps)]
only = ["accuracy", "balanced_accuracy", "sensitivity", "specificity"]
table = report.wide(falls, only=only, intervals=only[:2])
display(report.show(beside_constant(table, labels)))
cost = pd.read_csv(run.run_dir / "suite_cost.csv")
report.show(cost.groupby("model", sort=False)[["forwards", "backwards", "seconds"]].sum())

# %% [markdown]
# **One model on one page.** This is what the call gives for any two-class model in [0, 1]: the threat model, a row per
# eps, the cost, and a figure of who fooled the images first.

# %%
study = open_study(run)
found = suite.attack(study, (run.adversarial or MODELS)[0])
print(checklist.page(found))
figure = plots.figure_worst_case(found, run.caption)
report.save_figure(figure, run, "one_page")
figure

# %% [markdown]
# *What to see.* On the left the worst case lies below every single attack (grey points, at the one eps where each met every
# image). On the right each image is counted once, for the attack that fooled it first: several colours mean that no single
# attack would have been enough.
#
# **Look at two attacks.** The attacked image at the headline eps for the baseline and for an adversarially trained model.

# %%
study = open_study(run)
trained = load_models(study, ["baseline", (run.adversarial or MODELS)[0]])
rows = attack_subset(study, 1)
x, y = study.images(rows), study.labels(rows)
how = dict(eps=run.headline_eps, steps=run.pgd_steps, loss="margin", stop_when_fooled=False)
classes = study.dataset.classes
shown, titles = [x], [[classes[label] for label in y.tolist()]]
for name, model in trained.items():
    adversarial = pgd(model, x, y, **how, seed=[(0, row) for row in rows]).x_adv
    answers = train.predict(model, adversarial)[0]
    shown += [adversarial, 0.5 + (adversarial - x) / (2 * run.headline_eps)]
    titles += [[f"{name}\n{classes[p.argmax()]} {p.max():.2f}" for p in answers]]
    titles += [["the change"] * len(x)]
titles = [title for line in zip(*titles, strict=True) for title in line]
images, columns = torch.stack(shown, 1).flatten(0, 1).cpu(), len(shown)
figure = plots.figure_samples(images, titles, run.caption, columns=columns)
report.save_figure(figure, run, "adversarial")
figure

# %% [markdown]
# *What to see.* The change that fools the baseline looks like noise. On real images the change that an adversarially
# trained model forces tends to follow the anatomy: to change its answer one must draw something that looks like the other
# class (Tsipras et al., *Robustness May Be at Odds with Accuracy*, 2019). At 48 px this is only hinted at.

# %% [markdown]
# **What we learnt.** The same attacks, the worst case per image, beside the constant answer: plain training falls at once,
# adversarial training keeps a part. The regularisers and distillation are hardly better than the baseline, which section 6
# explains.

# %% [markdown]
# ## 6 Is it to be believed?
#
# An attack by gradient needs a gradient. If a model's logits are hundreds apart, the softmax is exactly 0 or 1 in 32-bit
# arithmetic, the gradient of the cross-entropy is exactly zero, and FGSM and PGD stand still: the model *looks* robust.
# Five lines show it:

# %%
z = torch.tensor([[0.0, 5.0], [0.0, 50.0], [0.0, 200.0]], requires_grad=True)
losses = {"cross-entropy": F.cross_entropy(z, torch.tensor([1, 1, 1]), reduction="sum")}
losses["margin z_wrong - z_right"] = (z[:, 0] - z[:, 1]).sum()
table = {name: torch.autograd.grad(loss, z)[0][:, 0].tolist() for name, loss in losses.items()}
report.show(pd.DataFrame(table, index=pd.Index(["5", "50", "200"], name="logits apart by")))

# %% [markdown]
# The margin $z_{wrong} - z_{right}$ points the same way and never saturates. So compare the two losses, and count the
# images whose gradient is exactly zero.

# %%
study = open_study(run)
test_opened(study, "share of zero gradients")
shares = {name: suite.zero_gradients(study, name) for name in MODELS}
results = report.update_results(report.zero_gradient_rows(shares, study), RESULTS)
masking = report.masking_table(results, eps=run.headline_eps)
report.show(masking)

# %%
names = {"pgd_ce": "accuracy,\nPGD, cross-entropy", "pgd_margin": "accuracy,\nPGD, logit margin"}
names["zero_gradients"] = "share of images with\nan exactly zero gradient"
figure, ((axis,),) = plots.panels(1, width=max(7.0, 0.55 * len(masking)), height=3.6)
bars = masking[[*names]].rename(columns=names)
bars.plot.bar(ax=axis, width=0.8, color=[*plots.COLORS], ylim=(0, 1.02), legend=False)
axis.set_xticks(range(len(masking)), masking.index, rotation=25, ha="right")
axis.set_xlabel("")
figure.legend(loc="outside right center", fontsize=9, frameon=False)
gap = masking["gap"].abs()
title = f"PGD at {eps_text(run.headline_eps)} with two losses: largest gap {gap.max():.2f}"
plots.titled(figure, f"{title} ({gap.idxmax()})", run.caption)
report.save_figure(figure, run, "masking")
figure

# %% [markdown]
# *What to see.* Where the first bar stands above the second, the cross-entropy attack was blinded: masked gradients
# (Athalye, Carlini and Wagner, *Obfuscated Gradients Give a False Sense of Security*, 2018,
# [1802.00420](https://arxiv.org/abs/1802.00420)). The third bar counts the exact zeros.
#
# **The check list** of Carlini et al. (*On Evaluating Adversarial Robustness*, 2019,
# [1902.06705](https://arxiv.org/abs/1902.06705)), as checks that can fail. A WARN is a finding about the *evaluation* of
# that model: do not believe its robust accuracy before you know why.

# %%
where = "5 The suite"
checks = {name: stored(study, f"checks_{name}", model=name, section=where) for name in MODELS}
checks = pd.concat(checks, names=["model"]).reset_index("model").reset_index(drop=True)
counts = checks.groupby(["check", "verdict"], sort=False)["model"].agg(", ".join).unstack()
for verdict in {"PASS", "WARN"} - set(counts):
    counts[verdict] = np.nan
passed = checks[checks.verdict.eq("PASS")].groupby("check", sort=False).size()
counts = counts.reindex(list(dict.fromkeys(checks["check"])))
told = {"passed by": passed.reindex(counts.index, fill_value=0), "warned for": counts["WARN"]}
report.show(pd.DataFrame(told), notes=f"Of {len(MODELS)} models.")

# %%
warned = checks.loc[checks["verdict"].eq("WARN"), ["verdict", "model", "check", "value"]]
report.show(warned)

# %% [markdown]
# *What to see.* The attacks of the smoke profile have four steps, so *twice the steps* warns, rightly: a few images would
# still fall. The number says how many points of the worst case that is, at least in the sample that was tried.
#
# **What we learnt.** Cross-entropy PGD alone can be fooled by large logits, as in Papernot's distillation; the margin loss,
# the count of zero gradients and the check list uncover it. A robust accuracy is as good as the attacks behind it.

# %% [markdown]
# ## 7 Verdict
#
# Every model against the baseline on the *same* images, clean and in the worst case at the headline eps: McNemar's exact
# test (McNemar, *Note on the Sampling Error of the Difference between Correlated Proportions or Percentages*, 1947) counts
# only images on which the two disagree, here by patient, with Holm's adjustment.

# %%
study = open_study(run)
where = "5 The suite"
per_image = {name: stored(study, f"robust_{name}", model=name, section=where) for name in MODELS}
paired = report.paired_tests(per_image, study, eps=run.headline_eps, reference="baseline")
files.write_csv(paired, run.run_dir / "paired_tests.csv")
worst = paired[paired.condition.ne("clean")].set_index("model")
report.show(worst[["accuracy", "difference", "ci_low", "ci_high", "p_holm"]])

# %% [markdown]
# The sentences are written by code from this run's numbers, so that they cannot claim more than the run shows.

# %%
results = pd.read_csv(made_by(run, "results.csv", "5 The suite"))
masking = report.masking_table(results, eps=run.headline_eps)
Markdown(report.verdict(results, masking, paired, run))


# %% [markdown]
# ### Several seeds
#
# One training is one draw: of the new head, the order of the images, the validation split. A difference between two
# defences counts only if it is larger than what another seed does to either. Run the study again under other seeds, then
# this section with their names:
#
# ```
# python -m dlia_utils run --nb 01 --profile cpu --set seed=1 --run-name s1
# python -m dlia_utils run --nb 01 --profile cpu --set seed=2 --run-name s2
# python -m dlia_utils run --nb 01 --profile cpu --set 'seed_runs=("s1","s2")' --run-name all
# ```
#
# The last one has seed 0 and takes over what another run of seed 0 has made; `--set 'defences=("papernot",)'` leaves out
# some of the models that see no attack. With no names in `seed_runs` there is one seed and no spread.

# %%
def of_seeds(name, kind):
    """A table of the suite by seed: of this run and of those that `seed_runs` names."""
    found = {}
    for folder in (run.run_dir, *(run.run_dir.parent / one for one in run.seed_runs)):
        path = folder / "tables" / f"{kind}_{name}.csv"
        if path.exists():
            seed = files.read_json(folder / "config.json")["settings"]["seed"]
            found.setdefault(seed, pd.read_csv(path))
    return found


def spread(values):
    """Mean, standard deviation over the seeds (n - 1), smallest and largest."""
    ends = f"{values.std():.3f} ({values.min():.3f} to {values.max():.3f})"
    return f"{values.mean():.3f}" + f" ± {ends}" * (len(values) > 1)


# %%
study = open_study(run)
others = [run.run_dir.parent / name / "results.csv" for name in run.seed_runs]
rows = [pd.read_csv(path) for path in (made_by(run, "results.csv", "5 The suite"), *others)]
rows = pd.concat(rows).drop_duplicates(report.IDENTITY)
if len(rows[["size", "profile", "data"]].drop_duplicates()) > 1:
    raise ValueError("seed_runs must name runs of the same size, profile and data")
files.write_csv(rows, run.run_dir / "all_results.csv")
near = rows[np.isclose(rows.eps, run.headline_eps) | rows.attack.eq("clean")]
near = near.assign(what=near.attack + " " + near.metric)
only = [f"{a} {m}" for a in ("clean", "worst") for m in ("accuracy", "balanced_accuracy")]
near = near[near.what.isin(only)]
at = {"index": "model", "columns": "what", "values": "value", "sort": False}
table = near.pivot_table(**at, aggfunc=spread).reindex(columns=only)
table["seeds"] = near.groupby("model")["seed"].nunique()
report.show(table)

# %% [markdown]
# **One form of adversarial training against another.** That all of them beat a baseline at zero says little. So each is
# tested against the first of them, on the same images and all seeds that both have. A patient stays one piece of evidence,
# however many images and seeds it has: the test speaks of these trainings, for other patients. What another seed would do
# stands in the table above.

# %%
first, *others = run.adversarial or [""]
base, among = of_seeds(first, "robust"), []
for name in others:
    own = of_seeds(name, "robust")
    both = [seed for seed in base if seed in own]
    pooled = {first: pd.concat([base[s] for s in both]), name: pd.concat([own[s] for s in both])}
    if any(set(one.image) != set(study.rows("test")) for one in (*base.values(), *own.values())):
        raise ValueError("a run that seed_runs names has another test split")
    found = report.paired_tests(pooled, study, eps=run.headline_eps, reference=first)
    found = found.assign(seeds=len(both), reference_model=first)
    among.append(found.assign(seed=" ".join(map(str, both))))
if among:
    among = pd.concat(among, ignore_index=True)
    among["p_holm"] = among.groupby("condition")["p"].transform(metrics.holm)
    files.write_csv(among, run.run_dir / "seed_tests.csv")
    shown = ["seeds", "accuracy", "reference", "difference", "ci_low", "ci_high", "p_holm"]
    display(report.show(among.set_index(["condition", "model"])[shown], digits=3))
checks = {name: of_seeds(name, "checks") for name in MODELS}
checks = {(name, seed): one for name, found in checks.items() for seed, one in found.items()}
checks = pd.concat(checks, names=["model", "seed"]).reset_index(["model", "seed"])
checks = checks.drop(columns="why").assign(**report.origin(run) | {"seed": checks["seed"]})
saved = files.write_csv(checks, run.run_dir / "all_checks.csv")


# %% [markdown]
# *What to see.* A difference whose interval holds 0, or that is smaller than the spread over seeds above, is no ranking.
#
# ### The real study
#
# All 624 images of the official test split of *Chest X-Ray Images (Pneumonia)* (a copy of the set that was scaled to
# 224 px and saved again as JPEG), the `cpu` profile: 112 px, MobileNetV2 from pretrained features, 5 epochs. Of two seeds the
# table tells the mean ± the standard deviation. Always answering "pneumonia" is right on 0.625 of the images, with a
# balanced accuracy of 0.5.
#
# <!-- table study-01 -->
#
# ![Worst-case accuracy against eps on the real images, seed 0: two adversarially trained models stay above the dotted line of a constant answer, two fall below it, the plain and the distilled model are at zero from one grey level on](attachment:worst_case.png)
#
# - Plain training and Papernot's distillation: **0.000** from 1/255 on. In an older survey (one seed) both Lipschitz models,
#   the margin penalty and plain distillation had 0.000 at 4/255, too. None of them is a defence.
# - `pgd_at` keeps **0.716** and **0.728** (seeds 0 and 1), `mart` 0.681 and 0.684: above the constant answer with their
#   whole intervals, and no worse on clean images than plain training by what 624 images can show.
# - `trades` and `hat` stay below the constant answer. Five epochs are few for them (their validation score came to
#   0.76 or 0.77, that of `pgd_at` to 0.92): no verdict on the methods. In the survey fast AT and GAIRAT lay about that answer.
# - What is kept is mostly pneumonias: healthy chests are called healthy less often under attack.
# - Two seeds, `hat` one: a difference as small as the spread of the table is no ranking.
#
# All tables, with each attack, the certificate and the published numbers beside ours: [results/README.md](../results/README.md).

# %% [markdown]
# **What we learnt.** Of thirteen defences only some of those trained *on attacks* keep anything at 4/255, and two of them
# more than a constant answer would; that comes from the worst case, not from any single attack or from clean accuracy.

# %% [markdown]
# ## 8 Extra: are the probabilities honest?
#
# A model that says 0.9 should be right nine times in ten. The *expected calibration error* (ECE; here ten bins of equal
# mass) is the mean distance from that; *if calibrated* is what a perfect model would score by chance on so few images, so
# only an ECE well above it means anything. One temperature, fitted on the *validation* images, divides the logits (Guo et
# al., *On Calibration of Modern Neural Networks*, 2017, [1706.04599](https://arxiv.org/abs/1706.04599)); it cannot change
# an answer or an AUC. The *Brier score* is the mean squared error of the probability. Both are lopsided near 0, so their
# intervals are BCa: bias-corrected and accelerated (Efron, *Better Bootstrap Confidence Intervals*, 1987).

# %%
def calibration_of(study, model, labels, patients):
    """Metric rows before and after one temperature, and the calibrated probabilities."""
    on_val, on_test = (train.log_odds(model, study.torch_set(part)) for part in ("val", "test"))
    two = np.stack([np.zeros_like(on_val), on_val], axis=1)
    temperature = calibration.fit_temperature(two, study.labels(study.rows("val")).cpu().numpy())
    told = {"clean": expit(on_test), "clean, temperature": expit(on_test / temperature)}
    rows = [
        calibration.summary(labels, p, patients, draws=run.bootstrap_draws).assign(attack=when)
        for when, p in told.items()
    ]
    return pd.concat(rows).assign(temperature=temperature), told["clean, temperature"]


# %%
study = open_study(run)
rows = study.rows("test")
labels, patients = study.labels(rows).cpu().numpy(), study.patients(rows)
test_opened(study, "calibration")
table, calibrated = [], {}
with warnings.catch_warnings(record=True) as told:
    for name, model in load_models(study, MODELS).items():
        found, calibrated[name] = calibration_of(study, model, labels, patients)
        table.append(found.assign(model=name))
table = pd.concat(table)
report.update_results(report.result_rows(table.filter(report.RESULT_COLUMNS), run), RESULTS)
after = {"clean": "", "clean, temperature": ", after the temperature"}
table["what"] = table.metric.replace({"ece": "ECE", "brier": "Brier"}) + table.attack.map(after)
only = ["ECE", "ECE, after the temperature", "Brier", "Brier, after the temperature"]
shown = report.wide(table, "what", only=only, intervals=only[:2])
first = table[table.metric.eq("ece") & table.attack.eq("clean")].set_index("model")
notes = "; ".join({str(one.message) for one in told})
report.show(first[["temperature", "if_calibrated"]].join(shown), notes=notes)

# %%
some = ["baseline", "papernot", *run.adversarial[:1]]
some = {name: calibrated[name] for name in some if name in calibrated}
draws, gaps = min(500, run.bootstrap_draws), {}
figure, ((axis,),) = plots.panels(1, width=6.0, height=4.2)
axis.plot([0, 1], [0, 1], ":", color="0.6")
for number, (name, p) in enumerate(some.items()):
    table = calibration.reliability(labels, p, patients, draws=draws)
    x, y, style = table["probability"], table["value"], plots.line_style(number)
    reach = [(y - table[end]).abs() for end in ("ci_low", "ci_high")]
    axis.errorbar(x, y, reach, label=name, capsize=2, **style)
    gaps[name] = (y - x).abs().max()
axis.set(xlabel="mean P(class 1) in the bin", ylabel="share of class 1", aspect="equal")
figure.legend(loc="outside right center", fontsize=9, frameon=False)
most = max(gaps, key=gaps.get)
title = f"Reliability, bins of equal mass: furthest off by {gaps[most]:.2f} ({most})"
plots.titled(figure, title, run.caption)
report.save_figure(figure, run, "reliability")
figure


# %% [markdown]
# *What to see.* On the dotted line a model that says 0.9 is right nine times in ten. Mind the share of pneumonias: it is
# that of this test split, not of a hospital.
#
# **Sensitivity at a specificity of 0.9.** *From validation*: the threshold that gives 0.9 on validation images, used on the
# test images; the specificity that really comes of it stands beside it. *On the test ROC* chooses its threshold on the
# very images it is scored on: an upper reference, nothing that could be had in use.

# %%
def roc_point(labels, score, weights=None, specificity=0.9):
    """The highest sensitivity with that specificity, and its threshold (positive is above)."""
    if weights is not None and not weights[labels == 0].any():
        return np.nan, np.nan
    false_alarm, hit, cut = roc_curve(labels, score, sample_weight=weights, drop_intermediate=False)
    place = np.flatnonzero(1 - false_alarm >= specificity - 1e-9)[-1]
    return hit[place], cut[place + 1]


def at_specificity(labels, score, patients, threshold):
    """What a threshold from validation gives, and the best that the test ROC itself has."""
    options = {"draws": run.bootstrap_draws}
    fixed = metrics.classification(labels, score, patients, threshold=threshold, **options)
    fixed = fixed[fixed["metric"].isin(["sensitivity", "specificity"])]

    def best(weights):
        return np.array([roc_point(labels, score, w)[0] for w in weights])

    table = [fixed.assign(metric=fixed["metric"] + "_at_0.9_val_threshold")]
    table.append(metrics.bootstrap(best, patients, **options))
    return pd.concat(table).fillna({"metric": "sensitivity_at_0.9_test_roc"})


# %%
val_labels, fixed = study.labels(study.rows("val")).cpu().numpy(), []
for name, model in load_models(study, MODELS).items():
    on_val, on_test = (train.log_odds(model, study.torch_set(part)) for part in ("val", "test"))
    found = at_specificity(labels, on_test, patients, roc_point(val_labels, on_val)[1])
    fixed.append(report.result_rows(found, run, model=name))
fixed = pd.concat(fixed)
report.update_results(fixed, RESULTS)
names = {"sensitivity_at_0.9_val_threshold": "sensitivity, threshold from validation"}
names |= {"specificity_at_0.9_val_threshold": "specificity, threshold from validation"}
names |= {"sensitivity_at_0.9_test_roc": "sensitivity, on the test ROC"}
report.show(report.wide(fixed.replace({"metric": names})))


# %% [markdown]
# **What we learnt.** A threshold is part of the model and is chosen on validation images; what it gives on test images is
# the number to report, also where it is not the one that was hoped for.

# %% [markdown]
# ## 9 Extra: FGSM in the units of the original study
#
# The original study added $\varepsilon$ to the *normalised* image. One normalised unit is $\sigma_c \approx 0.225$ of the
# pixel range and differs between the colour channels, so its 0.03 is about 1.7/255, and the attacked image is slightly
# tinted. We repeat it exactly (three channels, per-channel eps) so that the published numbers can be compared, and then
# leave these units for good. In one line: `eps_pixel = eps_normalised * std`.

# %%
def fgsm_normalised(study, name):
    model, tables = load_models(study, [name])[name], []
    rows, std = study.rows("test"), model.std.flatten().cpu()
    for eps in run.published_eps_grid:
        for chunk in np.array_split(rows, -(-len(rows) // (run.attack_batch or 64))):
            x, y = study.images(chunk).expand(-1, 3, -1, -1), study.labels(chunk)
            fooled = fgsm(model, x, y, eps=normalised_eps(eps, std).to(x.device)).success.cpu()
            tables.append(pd.DataFrame({"eps": eps, "image": chunk, "fooled": fooled}))
    return pd.concat(tables).assign(attack="fgsm_normalised")


# %%
study = open_study(run)
test_opened(study, "FGSM in normalised units")
for name in MODELS:
    made = partial(fgsm_normalised, study, name)
    per_image = stored(
        study, f"fgsm_normalised_{name}", made, model=name, uses=["published_eps_grid"]
    )
    rows = report.accuracy_rows(per_image, study, model=name, eps_unit="normalised")
    results = report.update_results(rows, RESULTS)

# %%
answers = np.bincount(study.labels(study.rows("test")).cpu())
options = {"attack": "fgsm_normalised", "unit": "normalised"}
options["constant"] = answers.max() / answers.sum()
note = "FGSM as in the original study"
figure = plots.figure_accuracy_vs_eps(results, run.caption, note=note, **options)
report.save_figure(figure, run, "fgsm_normalised")
figure


# %% [markdown]
# *What to see.* A curve that stays up here is *not yet* a robust model: FGSM takes one step, trusts the gradient of the
# cross-entropy, and both can be fooled themselves.

# %% [markdown]
# **What we learnt.** An eps without its unit is no number: the same 0.03 is 1.7 grey levels here and 7.7 elsewhere.

# %% [markdown]
# ## 10 Extra: a certificate
#
# Everything above shows what *our* attacks could not do. Randomised smoothing proves something about all attacks: ask the
# noise-trained model about thousands of noisy copies of an image and take the majority. If the majority is large, no change
# shorter than a radius $r$ (in L2: the length of the whole change) can turn it, with probability 1 - 0.001 for each image
# by itself (that *all* of 60 certified images are safe has a probability of about 0.94). Mind the unit: moving *every*
# pixel by 4/255 has a length of $\frac{4}{255}\sqrt{S \cdot S}$, far outside such a radius. The certificate and the table
# of section 5 answer different questions. The images are class-balanced: always one answer would be certified for half of
# them at any radius.

# %%
def certify(study, rows):
    model = load_models(study, ["gaussian_noise"])["gaussian_noise"]
    how = dict(sigma=run.sigma, n=run.certificate_draws, ids=rows, seed=run.seed)
    return smoothing.certify(fast_copy(model), study.images(rows), study.labels(rows), **how)


study = open_study(run)
rows = attack_subset(study, run.certified_per_class)
test_opened(study, f"a certificate for {len(rows)} images")
uses = ["certified_per_class", "sigma", "certificate_draws", "seed"]
given = dict(model="gaussian_noise", uses=uses)
certified = stored(study, "certificate_gaussian_noise", lambda: certify(study, rows), **given)

# %%
radii = np.array([0, 0.5, 1, 1.5, 2, 2.4]) * run.sigma  # 1,000 draws can show 2.46 sigma at most
right, patients, draws = certified["correct"], study.patients(rows), run.bootstrap_draws
sure = [right & certified["radius"].ge(radius) for radius in radii]
table = pd.DataFrame([metrics.share(one, patients, draws=draws) for one in sure])
table = table.assign(metric="certified_accuracy", eps=radii)
labels = {"model": "gaussian_noise, smoothed", "attack": "any, certified"}
table = report.result_rows(table, run, **labels, eps_unit="L2 length")
report.update_results(table, RESULTS)
unsure, whole = (certified["predicted"] == smoothing.ABSTAIN).mean(), run.headline_eps * run.size
print(f"every pixel moved by {eps_text(run.headline_eps)} is a change of L2 length {whole:.2f}")
print(f"no answer for {unsure:.0%} of the images")
cells = [report.with_interval(row) for _, row in table.iterrows()]
shown = {"L2 radius": table["eps"].round(3), "certified accuracy": cells, "images": table["n"]}
report.show(pd.DataFrame(shown), digits=3)


# %% [markdown]
# **What we learnt.** A certificate holds against every attack, but for small changes only: the radii here are a fraction of
# the length of a change of 4/255 in every pixel.

# %% [markdown]
# ## 11 Extra: One-Pixel
#
# A different attacker: no gradient, only the model's answers, and only one pixel (or three) may change, but by as much as
# it likes (Su, Vargas and Sakurai, *One Pixel Attack for Fooling Deep Neural Networks*, 2019,
# [1710.08864](https://arxiv.org/abs/1710.08864)). Differential evolution breeds a population of (row, column, red, green,
# blue) candidates: each is crossed with three others, and the better of old and new survives. An image leaves as soon as
# it is fooled. The two models and three settings are those of the original study; they cost up to 24,200 queries an image,
# so they run on a fixed, class-balanced sample of the test split.

# %%
def attack_one_pixel(model, study, rows, setting):
    x, y = study.images(rows).expand(-1, 3, -1, -1), study.labels(rows)
    options = dict(zip(("pixels", "population", "iterations", "f", "cr"), setting, strict=True))
    options["seed"] = [(run.seed, row) for row in rows]
    result = one_pixel(fast_copy(model), x, y, **options)
    before, after = (train.predict(model, images)[0][:, 1] for images in (x, result.x_adv))
    told = {"image": rows, "label": y.cpu(), "clean_probability": before, "probability": after}
    return pd.DataFrame(told | {"queries": result.queries.cpu()})


# %%
def one_pixel_rows(table, study, name, setting):
    """Result rows of one setting, with the clean accuracy of the same sample beside them."""
    patients, draws = study.patients(table["image"].to_numpy()), run.bootstrap_draws
    found = metrics.classification(table["label"], table["probability"], patients, draws=draws)
    right = (table["clean_probability"] > 0.5).eq(table["label"] == 1)
    beside = {"clean_accuracy": right.mean(), "queries_mean": table["queries"].mean()}
    beside = pd.DataFrame({"metric": beside.keys(), "value": beside.values(), "n": len(table)})
    pixels, population, iterations, f, cr = setting
    named = f"one_pixel k={pixels} pop={population} it={iterations} F={f:g} CR={cr:g}"
    labels = {"model": name, "attack": named, "eps": 1.0, "eps_unit": "pixels changed fully"}
    return report.result_rows(pd.concat([found, beside]), study.run, **labels)


# %%
study = open_study(run)
rows, uses = attack_subset(study, run.one_pixel_per_class), "one_pixel one_pixel_per_class seed"
test_opened(study, f"One-Pixel on {len(rows)} images")
names = [name for name in ("baseline", "lipschitz") if name in MODELS]
for name, model in load_models(study, names).items():
    for number, setting in enumerate(run.one_pixel, start=1):
        made = partial(attack_one_pixel, model, study, rows, setting)
        table = stored(study, f"one_pixel_{number}_{name}", made, model=name, uses=uses.split())
        outcome = one_pixel_rows(table, study, name, setting)
        results = report.update_results(outcome, RESULTS)

# %%
own = results[results.attack.str.startswith("one_pixel")]
only = ["clean_accuracy", "accuracy", "precision", "recall", "f1", "queries_mean"]
shown = report.wide(own, down=["attack", "model", "n"], only=only, intervals=["accuracy"])
report.show(shown.rename(columns={"accuracy": "accuracy under attack"}))

# %% [markdown]
# Compare with *clean accuracy*, which is that of the same sample, not of the whole test split. The original study saved
# its attacked images as JPEG before measuring, which wipes out a changed pixel; here the image goes to the model as the
# attack made it.
#
# **What we learnt.** An attack of another kind is not a weaker one by nature: it answers another question, and its budget
# (queries) belongs beside its result.

# %% [markdown]
# ## Takeaways
#
# - A plain network is broken by one gradient step; random noise of the same size does far less.
# - Report the worst case per image over several attacks, with an interval by patient, beside the constant answer.
# - Of all defences tried, only training on attacks keeps anything, and not every form of it; regularisers and distillation
#   keep nothing.
# - Equal losses, zero gradients and the check list tell whether a robust number may be believed.
# - Clean accuracy says nothing about any of this.

# %% [markdown]
# ## Exercises
#
# Try each before you open its solution.

# %% [markdown]
# **Exercise 1.** Make the first attack iterative: ten steps of eps/4, each time cut back to the ball of radius eps around
# the image. How many validation images survive at 2/255, against one FGSM step?
#
# <details><summary>Solution</summary>
#
# ```python
# study = open_study(run)
# model, (x, y) = load_models(study, ["baseline"])["baseline"], suite.held_out(study)
# eps = 2 / 255
#
# def climb(steps, size):
#     z = x.clone()
#     for _ in range(steps):
#         z.requires_grad_()
#         (gradient,) = torch.autograd.grad(F.cross_entropy(model(z), y), z)
#         z = z.detach() + size * gradient.sign()
#         z = torch.min(torch.max(z, x - eps), x + eps).clamp(0, 1)
#     return (model(z).argmax(1) == y).float().mean().item()
#
# print(f"one step: {climb(1, eps):.3f}, ten steps: {climb(10, eps / 4):.3f}")
# ```
#
# </details>
#
# Ten small steps follow the curve of the loss where one large step leaves it.

# %% [markdown]
# **Exercise 2.** Do adversarial examples transfer? Attack the baseline with PGD, and show the attacked images to an
# adversarially trained model.
#
# <details><summary>Solution</summary>
#
# ```python
# study = open_study(run)
# trained = load_models(study, ["baseline", run.adversarial[0]])
# x, y = suite.held_out(study)
# options = dict(eps=run.headline_eps, steps=10, loss="margin", seed=0)
# attacked = pgd(trained["baseline"], x, y, **options).x_adv
# for name, model in trained.items():
#     right = [(model(z).argmax(1) == y).float().mean().item() for z in (x, attacked)]
#     print(f"{name}: clean {right[0]:.3f}, images that were made against the baseline {right[1]:.3f}")
# ```
#
# </details>
#
# A transferred attack is far weaker than one made against the model itself: robustness to it proves little.

# %% [markdown]
# **Exercise 3.** How many images would a test split need so that the 95 % interval of an accuracy near 0.7 is no wider
# than four points? Compare with the number of test images of this run.
#
# <details><summary>Solution</summary>
#
# ```python
# share, width = 0.7, 0.04
# needed = share * (1 - share) * (2 * 1.96 / width) ** 2
# print(f"{needed:.0f} independent images; this run has {len(open_study(run).rows('test'))}")
# ```
#
# </details>
#
# Differences of two points between defences need thousands of images, or a paired test on the same ones.

# %% [markdown]
# ## Results and files
#
# Copy rows of `results.csv` into your own comparison: each says model, attack, eps, interval, n, seed, size, epochs,
# profile, data and hardware.

# %%
report.written(run)
