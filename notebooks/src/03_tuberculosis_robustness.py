# %% [markdown]
# # 03 Tuberculosis: can a model be right on 88 images in 100 and miss most of the sick?
#
# It can. *R2I-Medical-Imaging*, a study published as code by H. Ranjbar
# ([GitHub](https://github.com/HoseinRanjbar/R2I-Medical-Imaging)), put a robust CIFAR-10 network on
# chest images with and without tuberculosis (TB) and reported an accuracy of 0.88. The same
# notebook shows that it found 29 % of the images with TB: seven in ten were missed. **That is the finding of
# that study, not of this notebook**; what was measured here on real images stands in section 8.
#
# The data explain the accuracy: the *TB Chest Radiography Database* (Rahman et al., *Reliable
# Tuberculosis Detection Using Chest X-ray With Deep Learning, Segmentation and Visualization*, 2020)
# holds five normal images for each one with TB, so calling all of them normal is right on 83 %. Two
# bugs were at work as well, and nobody noticed, because the network still learnt *something*. We
# show both live, then ask what comes first for a disease that one must not miss: how many of the
# sick are found, at which threshold, for how many false alarms, and how many an attack can hide.
#
# **What you will learn.**
# - What accuracy, sensitivity, specificity, balanced accuracy and AUPRC say where one class is rare.
# - How one line of code can scramble the features of a network, and how normalising by one image
#   moves every result, both without an error message.
# - How to choose an operating point on validation images, and how to test whether it keeps its
#   promise.
# - How to count the patients that an attack hides at the very threshold that would be used.
# - How to compare models on the same images (McNemar) when there are several comparisons (Holm).
#
# **Before you start.** You have trained a classifier in PyTorch and can read pandas code. Attacks,
# adversarial training and the worst case over several attacks are explained at length in
# [01 pneumonia robustness](01_pneumonia_robustness.ipynb), robust models of the literature and maps
# in [02 FracAtlas](02_fracatlas_robust_models.ipynb); here they get a few lines each.
#
# **Time.** *smoke* on a laptop: about two minutes to run, an hour to read. *cpu* on a laptop: about
# three hours of one core, measured (at most five). *full* needs a GPU: at most 9 hours on Kaggle's two T4, by
# the plan below (not seen yet). A training stops after 90 minutes
# (`max_minutes`) and goes on when the notebook is run again.
#
# <!-- contents -->
#
# The outputs stored in this file are from the smoke profile on *synthetic* images with tiny networks:
# they show what you will see, and no finding. Press *Run All*. Every section also runs alone after
# the opening cells: trained models and finished tables are read back from the run folder.
#
# *For research and teaching. Not a medical device.*

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"  # "smoke" (two minutes), "cpu" (laptop, about three hours), "full" (GPU), "auto"
DATA_DIR = ""  # empty: find the data set; else the folder that holds Normal and Tuberculosis
RUN_NAME = ""  # empty: profile and kind of data
RESUME = True  # True: go on where a run stopped; False: anew; "force": under other settings
CHANGES = {}  # settings of your own, whatever the profile, such as {"epochs": 5}

# %% [markdown]
# **The settings.** FULL is the whole study; CPU and SMOKE are what is smaller on a laptop and in a
# first look. To change one, whatever the profile, write it into `CHANGES` above:
# `CHANGES = {"epochs": 5}`. A typo is told, a changed setting is starred below, and the run gets a
# folder of its own, which takes over whatever the change does not touch.

# %% tags=["settings"]
from dlia_utils.attacks import evaluate
from dlia_utils.units import pixel_eps

# The data: "pad" keeps the aspect; at most this share of the files may not decode
FULL = {"dataset": "tuberculosis", "seed": 0, "size": 224, "fit": "pad", "per_class": None}
FULL |= {"unusable_share": 0.01, "val_share": 0.1, "test_share": 0.1}
# The operating point: which share of the sick must be found
FULL |= {"sensitivity": 0.95}
# The network, MobileNetV2, and how it is trained
FULL |= {"width": 1.0, "stages": 7, "pretrained": True, "epochs": 30, "batch_size": 32, "lr": 1e-3}
FULL |= {"schedule": "onecycle", "patience": None, "max_minutes": 90.0, "num_workers": 2}
FULL |= {"hours": None}  # of a session; None is 11 of Kaggle's 12, and no limit elsewhere
# Both classes weigh the same: "weights" in the loss, or "sampling"
FULL |= {"balance": "weights"}
# Training on attacks (PGD-AT, TRADES); the new head: "linear", or "mlp" as in the original study
FULL |= {"at_eps": 4 / 255, "at_steps": 7, "at_step_size": 1 / 255, "trades_beta": 6.0}
FULL |= {"head": "linear"}

# %% tags=["settings"]
# Robust models of the literature ("public": downloaded); they learnt on images of 32 px
ZOO = ("chen2024_wrn_34_20", "gairat_wrn_28_10", "huang2021_wrn_34_r", "hat_wrn_34_10")
ZOO += ("rebuffi2021_wrn_70_16", "standard_wrn_28_10", "meansparse_wrn_94_16", "ra_wrn_70_16")
FULL |= {"zoo": ZOO, "zoo_weights": "public", "zoo_width": 1.0, "zoo_size": 64}
FULL |= {"zoo_epochs": 30, "zoo_lr": 1e-3, "zoo_maps": None}
FULL |= {"zoo_alphas": (0.0, 0.15, 0.3)}
# The attacks and their budgets; eps in grey levels of 255; attack_batch None: what fits in memory
FULL |= {"attacks": evaluate.SUITE, "eps_grid": pixel_eps(0.5, 1, 2, 4, 8), "headline_eps": 4 / 255}
FULL |= {"pgd_steps": 10, "pgd_restarts": 1, "attack_batch": None}
FULL |= {"budgets": {"square": {"steps": 2000}}}
# The eps at which the expensive ones run, if not at all; images of the check list
FULL |= {"expensive": {"square": pixel_eps(4)}, "check_images": 100}
# full_at: the eps at which every attack meets every image; most: images that one meets at most
FULL |= {"full_at": 4 / 255, "most": {"square": 200}}
# Another hospital: its folder of class folders ("": none), what in a file's path names the patient
# (a regular expression; "": nothing does), and how many of its images are attacked (None: all)
FULL |= {"external": "", "external_patients": "", "external_attacked": None}
# The maps, and how often patients are drawn for an interval
FULL |= {"maps": 72, "occlusion_window": 28, "integrated_steps": 32, "bootstrap_draws": 2000}

# %% tags=["settings"]
# What is cut so that `full` fits a session (9 hours of two T4, by the plan below; it was up to 89):
# the large networks have up to 800 times the multiplications of a MobileNetV2 at 224 px. They meet
# five attacks at two eps instead of the whole suite; MeanSparse chooses from 3 widths instead of 7.
FULL |= {"zoo_suite": {"eps_grid": pixel_eps(1, 4), "full_at": 4 / 255, "check_images": 20}}
FULL["zoo_suite"] |= {"attacks": ("fgsm", "pgd_ce", "pgd_margin", "apgd_margin", "square")}
FULL["zoo_suite"] |= {"budgets": {"apgd_margin": {"steps": 20}, "square": {"steps": 100}}}
FULL["zoo_suite"] |= {"expensive": dict.fromkeys(("apgd_margin", "square"), pixel_eps(4))}
FULL["zoo_suite"] |= {"most": {"square": 50}}

# %% tags=["settings"]
SHORT = {name: {"steps": 30} for name in ("apgd_ce", "apgd_margin", "fmn")}
SHORT |= {"square": {"steps": 200}}
# A laptop: smaller images, cheaper attacks, and none of the large robust models
CPU = {"size": 160, "epochs": 10, "num_workers": 0, "at_eps": 2 / 255, "at_steps": 2}
CPU |= {"at_step_size": 1.4 / 255, "zoo": (), "occlusion_window": 20, "integrated_steps": 16}
CPU |= {"eps_grid": pixel_eps(1, 2, 4), "budgets": SHORT, "check_images": 100}
CPU |= {"external_attacked": 200}

# %% tags=["settings"]
# A first look: 200 synthetic images, a network of three stages
SMOKE = {"size": 48, "per_class": (160, 40), "val_share": 0.15, "test_share": 0.2, "width": 0.5}
SMOKE |= {"stages": 3, "pretrained": "phantom", "epochs": 16, "batch_size": 16, "lr": 2e-3}
SMOKE |= {"num_workers": 0, "max_minutes": None, "bootstrap_draws": 200}
SMOKE |= {"at_eps": 4 / 255, "at_steps": 2, "at_step_size": 2.8 / 255}
# Two robust models, one of each family
SMOKE |= {"zoo": ("gairat_wrn_28_10", "meansparse_wrn_94_16"), "zoo_weights": "phantom"}
SMOKE |= {"zoo_width": 1 / 40, "zoo_size": 32, "zoo_epochs": 40, "zoo_lr": 2e-2}
SMOKE |= {"zoo_maps": 1, "zoo_alphas": (0.0, 0.2)}
# Few and short attacks
TINY = {name: {"steps": 4} for name in ("apgd_ce", "apgd_margin", "deepfool", "fmn")}
TINY |= {"noise": {"draws": 4}, "square": {"steps": 6}}
SMOKE |= {"eps_grid": pixel_eps(1, 4), "pgd_steps": 3, "budgets": TINY}
SMOKE |= {"expensive": dict.fromkeys(("apgd_ce", "apgd_margin", "square"), pixel_eps(4))}
SMOKE |= {"most": {"square": 20}, "zoo_suite": {"attacks": FULL["zoo_suite"]["attacks"]}}
SMOKE |= {"check_images": 4, "maps": 6, "occlusion_window": 8, "integrated_steps": 32}
SMOKE |= {"external": "phantom", "external_patients": r"(\w+-\d+)", "external_attacked": 16}

# %% tags=["start"]
from dlia_utils.run import start

run = start(
    "03_tuberculosis_robustness",
    dict(full=FULL, cpu=CPU, smoke=SMOKE),
    dict(profile=PROFILE, data_dir=DATA_DIR, run_name=RUN_NAME, resume=RESUME, changes=CHANGES),
    trains="3 Training",
    allowed={"attacks": evaluate.LINF, "zoo": ZOO, "pretrained": ("phantom",)},
)
print(run)

# %% tags=["imports"]
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from PIL import Image
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, precision_recall_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dlia_utils import calibration, files, launch, metrics, models, objectives, plots, report
from dlia_utils import plan, shortcuts, suite
from dlia_utils import study as studies
from dlia_utils.data import cache, datasets, explore, phantom, split
from dlia_utils.detect.figures import figure_pr
from dlia_utils.explain import activations, attribution, figures, localisation
from dlia_utils.models import robust
from dlia_utils.study import load_models, made_by, open_study, stored, test_opened, trained
from dlia_utils.train import predict
from dlia_utils.units import eps_text

# %% [markdown]
# **A model of your own** joins every comparison by one line: take one of the two that are commented
# out. It gets an image in [0, 1] and gives two logits.

# %% tags=["yours"]
# run.own["resnet18"] = lambda: models.backbone("resnet18", num_classes=2, pretrained=False)
# run.own["mine"] = models.wrap(my_trained_network, mean=[0.485], std=[0.225])
MODELS = ["standard", "pgd_at", "trades", "linear_probe", *run.own]
RESULTS = run.run_dir / "results.csv"


# %% [markdown]
# **What the sections share**: the images as a model takes them, since the robust models of the
# literature have a size of their own, the threshold that section 4 chooses for a model, and what
# attacks leave of its answers.

# %% tags=["yours"]
def study_of(name):
    """The images as the model `name` takes them."""
    study = open_study(run)
    return study if name in MODELS else suite.zoo_study(study)


def threshold_of(name):
    """The threshold on P(TB) that section 4 chose for the model `name`."""
    told = stored(study_of(name), f"operating_{name}", model=name, section="4 Sensitivity first")
    return told["threshold"].item()


# %% tags=["yours"]
def worst_case(rows, study):
    """Metrics of the answers that are left under all attacks at the headline's eps.

    Accuracy, sensitivity, specificity, and half of each: the balanced accuracy.
    """
    worst = rows[rows.attack.eq("worst") & np.isclose(rows.eps, run.headline_eps)]
    fooled, truth = worst.fooled.to_numpy(bool), worst.label.to_numpy()
    answer, patients = np.where(fooled, 1 - truth, truth), study.patients(worst.image.to_numpy())
    found = metrics.classification(truth, answer * 1.0, patients, draws=run.bootstrap_draws)
    counts = {"sensitivity": sum(truth), "specificity": sum(1 - truth)}  # images of one class each
    counts |= dict.fromkeys(("accuracy", "balanced_accuracy"), len(truth))
    return found.set_index("metric").loc[list(counts)].assign(n=counts).reset_index()


# %% [markdown]
# **What this will cost.** Before hours are spent: each phase with the passes of images that the settings ask for, counted
# from these alone, and the time that they take here, measured on a few random batches and, for the trainings, on images
# read and augmented. *At most* counts an attack as if it fooled nobody, and a training as if it never stopped early. Left
# out are figures of a few images, models of your own, and what the CPU does with maps and tables. A run that has a
# budget (`hours`; on Kaggle 11 of the session's 12) ends between two phases or epochs before it is cut off, and goes on
# in the next session. `python -m dlia_utils plan --nb 03 --profile full --device t4` tells the same of Kaggle's GPUs
# beforehand. The cells that count are folded.

# %% tags=["plan"]
study, net = open_study(run), "MobileNetV2"
networks, phases, sizes = suite.zoo_plan(study)
how = dict(batch=run.batch_size, val=sizes["val"], exact=run.patience is None)
how |= dict(settings="epochs at_steps size")
attacked = how | dict(steps=run.at_steps, judge=suite.judging(sizes["val"], steps=run.pgd_steps))
given = ("trainings", net, sizes["train"], run.epochs)
for name, objective in (("pgd_at", "pgd_adversarial"), ("trades", "trades")):
    phases += plan.training(*given, objective=objective, job=name, **attacked)
for name in ("standard", *run.own):
    phases += plan.training(*given, objective="cross_entropy", job=name, **how)
seen = sizes["train"] + sizes["val"]  # the features of linear_probe, once
phases.append(plan.Phase("new heads", net, seen, seen, job="linear_probe"))
few = min(600, sizes["train"]), min(600, sizes["val"]), min(200, sizes["val"])
probes = 2 * (few[0] + few[1]) + few[0] + 13 * few[2]  # section 2
phases.append(plan.Phase("probes on features", net, few[0], probes))

# %% tags=["plan"]
zoo = run.variant(**suite.zoo_settings(run))
phases += suite.phases(run, MODELS, sizes["test"], net)
phases += suite.phases(zoo, run.zoo, sizes["test"])
sick = int(study.labels(study.rows("test")).sum())
images, told = min(run.external_attacked or 0, 240), dict(settings="attacks budgets", exact=False)
for name in [*MODELS, *run.zoo]:
    own = dict(suite.options(zoo if name in run.zoo else run), at=None, full_at=None)
    own |= dict(through="meansparse" in name)
    once = evaluate.most_passes(sick, [run.headline_eps], **own)  # at the chosen threshold
    if run.external:
        once += evaluate.most_passes(images, [run.headline_eps], **own)
    given = ("attacks at the threshold", name if name in run.zoo else net, sick)
    phases.append(plan.Phase(*given, *once.tolist(), job=name, **told))
    clean = sizes["val"] + sizes["test"]
    phases.append(plan.Phase("clean images", given[1], sizes["test"], 2 * clean, exact=False))
loader = study.torch_set("train", augmented=True)

# %%
prices = plan.measured(networks, run.device, loader)
cost = plan.table(networks, phases, prices, gpus=torch.cuda.device_count() or 1)
print(plan.advice(cost, run.budget))
report.show(cost, digits=3)

# %% [markdown]
# ## 1 The data
#
# 3,500 normal images and 700 with tuberculosis, all brought to 512 x 512 pixels by the authors of the
# collection. First the number that any model has to beat. Of the four kinds of answer, true and false
# positives (TP, FP) and negatives (TN, FN), one computes
#
# $$\text{accuracy} = \frac{TP + TN}{\text{all}},\quad \text{sensitivity} = \frac{TP}{TP + FN},\quad
# \text{specificity} = \frac{TN}{TN + FP}$$
#
# and *balanced accuracy*, the mean of the last two. Sensitivity (of TB images, the share found) is
# also called recall. What does a "model" reach that calls every image normal?

# %%
study = open_study(run)
truth = study.labels(study.rows("train")).cpu().numpy()  # 0 normal, 1 tuberculosis
answer = np.zeros_like(truth)
sensitivity, specificity = (answer[truth == 1] == 1).mean(), (answer[truth == 0] == 0).mean()
print(f"accuracy {(answer == truth).mean():.3f}, sensitivity {sensitivity:.0f}")
print(f"balanced accuracy {(sensitivity + specificity) / 2:.1f}")

# %% [markdown]
# The collection names no patients and has no split. So one split is drawn for all models, 80 / 10 /
# 10 (in the smoke profile 65 / 15 / 20) and stratified. Byte-identical images and near-duplicates
# (alike in a perceptual hash, a 64-bit summary of an image, and confirmed by correlation) stay on one
# side: the nearest one can get to a split by patient.

# %%
print(study.dataset.split_rule)
report.show(datasets.summary(study.dataset))

# %%
report.show(split.audit(study.dataset), digits=0)

# %%
labels = study.labels(study.rows("train")).cpu().numpy()
shown = np.concatenate([study.rows("train")[labels == c][:6] for c in (0, 1)])
titles = study.dataset.manifest.loc[shown, "class_name"]
figure = plots.figure_samples(study.images(shown).cpu().numpy(), titles, run.caption)
report.save_figure(figure, run, "samples")
figure

# %% [markdown]
# **What to see in it.** Tuberculosis mostly shows as clouds in the upper parts of the lungs; the
# synthetic images imitate that, and nothing else differs between their classes. In the real
# collection look at everything *but* the lungs: letters, edges, the way the image is cropped.

# %% [markdown]
# **The classes come from different hospitals.** By its authors' account most normal images are from
# the RSNA pneumonia set (USA), the TB images from Shenzhen, Montgomery County and Belarus. Scanner,
# cropping, letters and grey scale differ with the class, and a network may name the hospital instead
# of the disease. Two quick checks, the first: does the *size* of the file tell the class? The table
# shows the AUC, the area under the ROC curve: the chance that of two images, one of each class, the
# sick one gets the higher score (0.5 is a coin, 1 is perfect).

# %%
sizes = explore.size_shortcut(study.dataset, study.cache.shapes, draws=run.bootstrap_draws)
report.show(report.wide(sizes, down=["features", "finding"]))

# %% [markdown]
# The second check: do parts of the image that hold no lung tell the class? A logistic regression
# learns from thumbnails of 16 x 16 pixels of which only the border (a tenth of the side) or only the
# corners are left. It is scored on *validation* images: the test split is still closed.

# %%
rng, parts = np.random.default_rng(run.seed), []
for part in ("train", "val"):
    rows = rng.permutation(study.rows(part))[:800]
    parts.append(shortcuts.sample(study.dataset, study.cache, study.images(rows), rows))
asked = ("whole", "centre_only", "border_only", "corners_only")
how = dict(regions=asked, draws=run.bootstrap_draws)
regions = shortcuts.region_accuracy(shortcuts.linear_probe(), *parts, **how)
files.write_csv(regions, run.run_dir / "tables" / "regions.csv")
regions["region"] = regions["region"].str.replace("_", " ")
report.show(report.wide(regions, down="region", intervals=["auc", "balanced_accuracy"]))

# %% [markdown]
# Brackets hold 95 % intervals from a bootstrap: whole patients (here: images) are drawn again and
# again with replacement, and the middle 95 % of the results are shown.
#
# **What we learnt.** Where one class is rare, accuracy says little; ask for sensitivity *and*
# specificity. And compare "border only" with 0.5: if it is far above, no accuracy on this collection,
# however high, shows that a network reads lungs. Images of a hospital that sent both classes ask
# better (section 7). Keep that in mind for every number below.

# %% [markdown]
# ## 2 Two bugs, shown live
#
# **Bug 1: scrambled features.** A convolutional network ends in a map of features [B, C, h, w]: for B
# images, C channels at h x w places. *Pooling* takes the mean of each channel and leaves C numbers an
# image. The published code instead calls `view(-1, C)`, which cuts the memory into pieces of C
# numbers. See what that does to one image with four channels of 2 x 2 places:

# %%
maps = torch.arange(1.0, 17).reshape(1, 4, 2, 2)  # channel 1 is 1 to 4, channel 2 is 5 to 8
rows = maps.reshape(-1, 4)  # what view(-1, C) does
print("pooled, the mean of each channel:", maps.mean((2, 3)).tolist()[0])
print("scrambled, four rows for one:", rows.int().tolist())
print("their mean, taken for features:", rows.mean(0).tolist())


# %% [markdown]
# In memory the map lies channel after channel. So a row holds *all places of one channel*, and the
# mean of the rows mixes all channels: four clearly different numbers (2.5 to 14.5) became nearly the
# same ones (7 to 10).
#
# How could that go unnoticed? Before it, the code pools with a window of fixed size, `avg_pool2d(8)`,
# made for photographs of 32 pixels: their map has 8 x 8 places, the window leaves one, and the line is
# right. At the 320 pixels of that study the map has 80 x 80 places, the window leaves 10 x 10, and
# each image becomes *100* rows. The two lines of the study as functions:

# %%
def scrambled(maps, window):
    """The published line: maps [B,C,h,w] to rows of C numbers, as many as fit."""
    return F.avg_pool2d(maps, window).reshape(-1, maps.shape[1])


def folded(maps, window):
    """The published remedy: the average of an image's rows [B,C]."""
    return scrambled(maps, window).reshape(len(maps), -1, maps.shape[1]).mean(1)


# %% [markdown]
# The loss does complain: labels and rows do not match in number. The author then averaged the 100
# answers of each image to silence it (for a linear head the same as averaging the rows, as `folded`
# does). Here are three of that study's networks at 80 pixels, where four rows come out of an image.
# Random weights will do, since the bug is in the shapes.

# %%
def counted(name, images, truth):
    """How many rows the published line makes of `images`, and what the loss says to that."""
    model = robust.create(name, width=1 / 16).to(run.device).eval()
    maps = activations(model, images, models.last_map_layer(model))
    logits = model.head(scrambled(maps, 8))
    try:
        complaint = F.cross_entropy(logits, truth)
    except ValueError as error:
        complaint = error
    found = {"model": name, "map": "{} channels, {} x {} places".format(*maps.shape[1:])}
    found |= {"images": len(images), "rows, published": len(logits)}
    return found | {"rows, pooled": len(model(images)), "the loss says": complaint}


# %%
study = open_study(run)
rows = study.rows("train")[:4]
four, truth = F.interpolate(study.images(rows), (80, 80)), study.labels(rows)
names = ("standard_wrn_28_10", "hat_wrn_34_10", "huang2021_wrn_34_r")
report.show(pd.DataFrame([counted(name, four, truth) for name in names]))


# %% [markdown]
# **What does it cost?** Take the frozen features of one MobileNetV2, once pooled and once scrambled and
# folded, and train the same logistic regression (a *probe*) on both. (Its map is smaller than the
# window of 8, so the window is left out here.) Four helpers: images and labels of a random part of a
# split, the features, the probe, and how much a feature resembles what took its place.

# %%
def sampled(study, **most):
    """Random rows of splits, at most so many each, and their labels: two dictionaries by split."""
    rng = np.random.default_rng(run.seed)
    rows = {part: rng.permutation(study.rows(part))[:n] for part, n in most.items()}
    return rows, {part: study.labels(own).cpu().numpy() for part, own in rows.items()}


# %%
@torch.no_grad()
def read(network, images, fold=False):
    """Features [N,C] of normalised images [N,1,S,S]: pooled, or scrambled and folded."""
    parts = []
    for part in images.split(64):
        maps = network.features(part.expand(-1, 3, -1, -1))
        parts.append(folded(maps, 1) if fold else maps.mean((2, 3)))
    return torch.cat(parts).cpu().numpy()


# %%
def fresh_probe():
    regression = LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000)
    return make_pipeline(StandardScaler(), regression)


# %%
def likeness(right, wrong):
    """Correlation over images [C] of each feature with what took its place."""
    right, wrong = (StandardScaler().fit_transform(one) for one in (right, wrong))
    r = (right * wrong).mean(0)[right.std(0) > 0]  # a channel that never answers resembles nothing
    return {"median_r": np.median(r), "kept": (r > 0.9).mean(), "channels": len(r)}


# %%
def compared(study):
    """Metrics of a probe on pooled and on scrambled features, and how alike the two are."""
    model, (rows, labels) = studies.build_model(run).eval(), sampled(study, train=600, val=600)
    images = {part: model.normalize(study.images(own)) for part, own in rows.items()}
    patients, tables, learnt = study.patients(rows["val"]), [], []
    for kind, fold in (("pooled", False), ("scrambled, folded", True)):
        seen = {part: read(model.backbone, own, fold) for part, own in images.items()}
        probe = fresh_probe().fit(seen["train"], labels["train"])
        score, how = probe.predict_proba(seen["val"])[:, 1], dict(draws=run.bootstrap_draws)
        found = metrics.classification(labels["val"], score, patients, **how)
        tables.append(found.assign(features=kind))
        learnt.append(seen["train"])
    return pd.concat(tables).assign(**likeness(*learnt))


# %%
study = open_study(run)
uses = ["width", "stages", "pretrained", "seed", "bootstrap_draws"]
probes = stored(study, "scrambled", lambda: compared(study), uses=uses)
first = probes.iloc[0]
print(f"of {first.channels:.0f} features {first.kept:.1%} still resemble their own (r > 0.9);")
print(f"the median correlation is {first.median_r:.2f}")
shown = ["auc", "balanced_accuracy", "sensitivity", "specificity"]
studies.starting_weights(run)  # noted in the run folder, for the rows
named = probes.assign(model="probe, " + probes.features, epochs=0)
alike = {"metric": ["median correlation", "share kept"], "value": [first.median_r, first.kept]}
alike = pd.DataFrame(alike).assign(n=first.channels, epochs=0, model="scrambled features")
named = pd.concat([named, alike]).drop(columns=["features", "median_r", "kept", "channels"])
report.update_results(report.result_rows(named, run, attack="clean, validation images"), RESULTS)
report.show(report.wide(probes, down="features", only=shown, intervals=shown[:2]))


# %% [markdown]
# The probe need not lose much: the sums still carry exposure and layout, which is why nobody noticed.
# But compare the correlations: these are not the features that were trained to withstand attacks, so
# nothing that is known of the robust models holds for them.
#
# **Bug 2: statistics of a single image.** The same code standardised every *training* image by its own
# mean and deviation (`samplewise`), and *validation* images by the mean and deviation of a training
# set of which it had drawn one image (`featurewise`, `sample_size=1`). Three numbers show the trouble:

# %%
def standardised(images, like=None):
    """Images [N,1,S,S] by their own mean and deviation, or all by those of `like` [1,S,S]."""
    by = images if like is None else like[None]
    spread = by.std((1, 2, 3), keepdim=True).clamp(min=1 / 255)
    return (images - by.mean((1, 2, 3), keepdim=True)) / spread


dark = torch.tensor([0.1, 0.2, 0.3]).reshape(1, 1, 1, 3)  # the "image" that was drawn
bright = 2 * dark + 0.3  # another one, of the same pattern
print("by its own statistics:", standardised(bright).flatten().numpy().round(1))
print("by the drawn image's: ", standardised(bright, dark[0]).flatten().numpy().round(1))


# %% [markdown]
# The network learnt from images like the first line and is asked about images like the second. Its
# validation accuracy jumped between 0.22 and 0.86 from run to run. To see that here, a probe is
# trained once, on images standardised one by one. Then the validation images come in as in training,
# and as in that study, with each of twelve training images as the one that was drawn.

# %%
def one_image_statistics(study):
    """Validation metrics of one probe, by the image whose statistics the validation images got."""
    network = studies.build_model(run).eval().backbone
    rows, labels = sampled(study, train=600, val=200)
    images = {part: study.images(own) for part, own in rows.items()}
    probe = fresh_probe().fit(read(network, standardised(images["train"])), labels["train"])
    table, patients = {}, study.patients(rows["val"])
    for drawn in (None, *range(12)):
        seen = standardised(images["val"], None if drawn is None else images["train"][drawn])
        score = probe.predict_proba(read(network, seen))[:, 1]
        found = metrics.classification(labels["val"], score, patients, draws=2)
        name = "own" if drawn is None else f"image {drawn}"
        table[name] = found.set_index("metric")["value"]
    return pd.DataFrame(table).T.rename_axis("statistics").reset_index()


# %%
study = open_study(run)
uses = ["width", "stages", "pretrained", "seed"]
swing = stored(study, "one_image_statistics", lambda: one_image_statistics(study), uses=uses)
swing = swing.set_index("statistics")[["accuracy", "sensitivity", "specificity", "auc"]]
one = swing.drop(index="own")
spread = {"lowest of 12": one.min(), "median": one.median(), "highest": one.max()}
spread = {"each image's own, as in training": swing.loc["own"]} | spread
named = pd.DataFrame(spread).rename_axis("metric").melt(ignore_index=False, var_name="attack")
named["attack"] = "validation images, statistics: " + named["attack"]
named = named.reset_index().assign(model="probe, standardised images", epochs=0)
named["n"] = min(200, len(study.rows("val")))
report.update_results(report.result_rows(named, run), RESULTS)
report.show(pd.DataFrame(spread).rename({"auc": "AUC"}).rename_axis("metric"))

# %% [markdown]
# Neither can happen in this suite: models take pixels in [0, 1], own their normalisation, pool by the
# mean over the map, give one row an image at any size, and training, test and attack go through the
# same code. In the published code the attack also cut the *standardised* images to [0, 1], and so
# lost all that was darker than an image's average.
#
# **What we learnt.** Both bugs leave a network that learns, and both change what its numbers mean.
# Compare the rows of an output with the images that went in, and the input at test time with the
# input in training. An error message about shapes is to be understood, not averaged away.

# %% [markdown]
# ## 3 Training
#
# Two ideas. **Class weights**: with five normal images to one, a loss that counts images is mostly
# about the normal ones. So an image of class c weighs $n / (K n_c)$, for n images of which $n_c$ are of
# that class and K = 2 classes. Both classes then count the same.

# %%
study = open_study(run)
counts = np.bincount(study.labels(study.rows("train")).cpu().numpy())
weights = counts.sum() / (len(counts) * counts)
print("training images of each class:", counts.tolist(), "-> weights", weights.round(3).tolist())
print("weight of all images of a class:", (counts * weights).tolist())
print("what the library uses:", study.class_weights())


# %% [markdown]
# **Adversarial training** (PGD-AT; Madry et al., *Towards Deep Learning Models Resistant to Adversarial
# Attacks*, 2018, [1706.06083](https://arxiv.org/abs/1706.06083)) learns from attacked images:
#
# $$\min_w \; \mathbb{E}\, \max_{\lVert d \rVert_\infty \le \varepsilon} L(f_w(x + d), y)$$
#
# The inner maximum is sought by PGD, projected gradient descent: a few steps in the direction of the
# gradient's sign, each cut back to at most eps from the image. In code, one step of the training:
#
# ```python
# x_adv = x + eps * (2 * torch.rand_like(x) - 1)  # a random start
# for _ in range(steps):
#     slope = torch.autograd.grad(F.cross_entropy(model(x_adv.requires_grad_()), y), x_adv)[0]
#     x_adv = (x_adv + step_size * slope.sign()).clamp(x - eps, x + eps).clamp(0, 1).detach()
# F.cross_entropy(model(x_adv), y, weight=weights).backward()
# ```
#
# | model | what is trained |
# |---|---|
# | standard | MobileNetV2, on images as they are |
# | pgd_at | the same network on attacked images |
# | trades | the same network on images as they are, and held to the same answer on attacked ones |
# | linear_probe | a new last layer on the frozen features that MobileNetV2 starts from |
# | robust models | a new last layer on frozen features of the literature's robust models (names in the setting `zoo`; needs a GPU in full size) |
#
# **TRADES** (Zhang et al., *Theoretically Principled Trade-off between Robustness and Accuracy*, 2019,
# [1901.08573](https://arxiv.org/abs/1901.08573)) parts the two aims. The label is learnt from the clean
# image; the attack looks for the point where the answer differs most from the clean one, measured
# by the Kullback-Leibler divergence (KL), and that difference is punished:
#
# $$L(f_w(x), y) + \beta \max_{\lVert d \rVert_\infty \le \varepsilon} KL(f_w(x) \,\Vert\, f_w(x + d))$$
#
# The class weights are on both terms. On the first alone, the rare class would be learnt and not
# defended.
#
# The epoch is chosen on validation images too: of `standard` by the AUC, of `pgd_at` and `trades` by
# balanced accuracy, half of it clean and half under attack. A model that never says "TB" would otherwise look
# good and, since nothing can change its answer, perfectly robust. A linear last layer alone is a
# convex problem with one optimum, so there the last epoch is kept.

# %%
def loss_of(study):
    """Cross-entropy in which both classes weigh the same."""
    return objectives.cross_entropy(weight=study.class_weights())


# %%
def train_on_attacks(study, name):
    how = dict(eps=run.at_eps, steps=run.at_steps, step_size=run.at_step_size)
    how["weight"] = study.class_weights()
    if name == "trades":
        loss = objectives.trades(**how, beta=run.trades_beta)
    else:
        loss = objectives.pgd_adversarial(**how)
    chosen = suite.choose_under_attack(study, steps=run.pgd_steps)
    return studies.train_model(study, name, loss, **chosen)


# %%
def train_linear_probe(study):
    model = models.with_head(studies.build_model(run), head=run.head, seed=run.seed)
    return studies.train_head(study, "linear_probe", model, loss_of(study), monitor="epoch")


# %%
LONGEST = ("trades", "pgd_at")


def trained_one(name):
    """Train the model `name` of this notebook, or read it back."""
    study = open_study(run)
    if name in LONGEST:
        return train_on_attacks(study, name)
    if name == "linear_probe":
        return train_linear_probe(study)
    return studies.train_model(study, name, loss_of(study), monitor="val_auc")


# %%
study = open_study(run)
print("starting weights:", studies.weights_label(run))
names = [*LONGEST, *(name for name in MODELS if name not in LONGEST)]
fitted = launch.each(trained_one, names, log_dir=run.run_dir / "logs")
done = {"model": list(fitted), "epochs": [len(one.history) for one in fitted.values()]}
done |= {"epoch kept": [one.best_epoch for one in fitted.values()]}
done |= {"minutes": [one.seconds / 60 for one in fitted.values()]}
report.show(pd.DataFrame(done))

# %%
names = ("standard", "pgd_at", "trades")
histories = {name: pd.read_csv(run.run_dir / name / "metrics.csv") for name in names}
figure = plots.figure_history(histories, run.caption)
report.save_figure(figure, run, "training")
figure


# %% [markdown]
# **What to see in it.** The losses cannot be compared: that of `pgd_at` is on attacked images, that of
# `trades` a sum of two. On the right, adversarial training takes longer to reach the AUC on clean images that
# plain training has after a few epochs.

# %% [markdown]
# **The robust models.** Three things went wrong with them in the original study and are done as they
# should be here: a checkpoint must fit key by key; the body is frozen *in eval mode*, else its batch
# norms would drift to the new images; and a MeanSparse model (Amini et al., *MeanSparse*, 2024,
# [2406.05927](https://arxiv.org/abs/2406.05927)), which sets features near their mean to the mean,
# gets the means of the training images, and the width of that dead zone (alpha) from validation
# images.

# %%
def train_robust_model(name):
    """A new head on the frozen body `name`; returns what loading its checkpoint said."""
    return suite.train_robust_model(study_of(name), name)


# %%
if run.zoo:
    study_of(run.zoo[0])  # decode once, before processes share the images
else:
    print("None in this profile. On Kaggle, with internet and a GPU: PROFILE = 'full'.")
loaded = launch.each(train_robust_model, list(run.zoo), log_dir=run.run_dir / "logs")
report.show(pd.DataFrame(loaded.items(), columns=["model", "checkpoint"]))

# %% [markdown]
# **What we learnt.** Where one class is rare, neither the loss nor the choice of the epoch may count
# images: here both classes weigh the same. A ranking (AUC) does not say from where on an image is
# called TB; that is chosen next. No test image has been seen so far.

# %% [markdown]
# ## 4 Sensitivity first
#
# A network gives a probability; somebody has to say from which one on a patient is called. Every
# threshold is a trade: a lower one finds more of the sick and alarms more of the healthy. The pair
# (sensitivity, specificity) at the chosen threshold is the **operating point**. Ten patients:

# %%
score = np.array([0.05, 0.10, 0.20, 0.30, 0.35, 0.45, 0.55, 0.60, 0.80, 0.95])  # P(TB)
sick = np.array([0, 0, 0, 0, 1, 0, 0, 1, 1, 1]) == 1
for threshold in (0.7, 0.5, 0.32):
    called = score > threshold
    print(f"threshold {threshold}: finds {called[sick].mean():.0%} of the sick,", end=" ")
    print(f"false alarms on {called[~sick].mean():.0%} of the healthy")


# %% [markdown]
# A screening test has to find the sick, and a false alarm costs a second examination. So the threshold
# here is not the customary 0.5 but the highest that still finds the wanted share of TB (setting
# `sensitivity`). It is chosen on **validation** images, before the test split is opened. Whether it
# keeps its promise on images it was not chosen on, the test will show.

# %%
def operating_point(study, name):
    """The highest threshold on P(TB) that finds the wanted share of the validation TB images."""
    model, labels = load_models(study, [name])[name], study.labels(study.rows("val")).cpu().numpy()
    score = predict(model, study.torch_set("val"))[0][:, 1]
    sick = np.sort(score[labels == 1])[::-1]
    last = sick[int(np.ceil(run.sensitivity * len(sick))) - 1]  # the least suspicious to be found
    threshold = (last + score[score < last].max(initial=0.0)) / 2  # half-way to the next below it
    called = score > threshold
    found = {"threshold": threshold, "sensitivity": called[labels == 1].mean()}
    found |= {"specificity": 1 - called[labels == 0].mean(), "TB images": len(sick)}
    return pd.DataFrame([found])


# %%
study = open_study(run)
names, points = [*MODELS, *trained(study, run.zoo)], {}
for name in names:
    own = study_of(name)
    chosen = partial(operating_point, own, name)
    points[name] = stored(own, f"operating_{name}", chosen, model=name, uses=["sensitivity"])
print(f"thresholds for a sensitivity of {run.sensitivity:g}, on validation images")
report.show(pd.concat(points).droplevel(1).rename_axis("model"))


# %% [markdown]
# **The test split is opened here**, after every choice has been made. Each model is scored at 0.5 and
# at its chosen threshold; what it said of each image is kept in `predictions.csv`.

# %%
def tested(name):
    """P(TB) of the test images [N], and result rows at both thresholds."""
    own, rows = study_of(name), []
    at = own.rows("test")
    labels, patients = own.labels(at).cpu().numpy(), own.patients(at)
    score = predict(load_models(own, [name])[name], own.torch_set("test"))[0][:, 1]
    for threshold, attack in ((0.5, "clean"), (threshold_of(name), "clean, chosen threshold")):
        how = dict(threshold=threshold, draws=run.bootstrap_draws)
        found = metrics.classification(labels, score, patients, **how)
        rows.append(report.result_rows(found, own.run, model=name, attack=attack))
    return score, pd.concat(rows)


# %%
study = open_study(run)
names = [*MODELS, *trained(study, run.zoo)]
test_opened(study, "clean metrics of all models at two thresholds")
found = {name: tested(name) for name in names}
clean = pd.concat([rows for _, rows in found.values()])
results = report.update_results(clean, RESULTS)

# %%
scores = {name: score for name, (score, _) in found.items()}
predictions = study.dataset.manifest.loc[study.rows("test"), ["path", "label"]].assign(**scores)
files.write_csv(predictions, run.run_dir / "predictions.csv")
clean["threshold"] = np.where(clean.attack.eq("clean"), "at 0.5", "chosen")
shown = ["sensitivity", "specificity", "balanced_accuracy", "accuracy", "auc"]
report.show(report.wide(clean, down=["model", "threshold"], only=shown, intervals=shown[:2]))


# %% [markdown]
# **What a positive answer is worth.** *Precision* is the share of true TB among positive answers. It
# depends on how common the disease is. With the sensitivity h (hits), the share of false alarms a = 1 -
# specificity and the share s of sick people, Bayes' rule gives h s / (h s + a (1 - s)):

# %%
def precision_at(hits, alarms, sick):
    """Share of true TB among positive answers, where the share `sick` of all people has TB."""
    return hits * sick / (hits * sick + alarms * (1 - sick))


for sick in (1 / 6, 0.01, 0.001):
    worth = precision_at(0.95, 0.10, sick)
    print(f"{sick:.1%} sick: of 100 positive answers of the same test {100 * worth:.0f} are true")


# %% [markdown]
# The share of TB in this collection, one in six, is nobody's clinic. An AUC does not depend on that
# share and so does not know how rare the disease is. The **precision-recall curve** (PR curve) does:
# for every threshold it shows the precision against the recall. Its area is the **AUPRC** (also called
# average precision): 1 for a perfect ranking, and for guessing the share of TB, not 0.5 (Saito and
# Rehmsmeier, *The Precision-Recall Plot Is More Informative than the ROC Plot When Evaluating Binary
# Classifiers on Imbalanced Datasets*, 2015).

# %%
def auprc(labels, score, patients):
    """The AUPRC as a metric row with its interval over patients."""
    draws, drawn = min(run.bootstrap_draws, 500), []
    for weight in metrics.patient_weights(patients, draws=draws):
        if weight[labels == 1].any():
            drawn.append(average_precision_score(labels, score, sample_weight=weight))
    value, (low, high) = average_precision_score(labels, score), np.quantile(drawn, [0.025, 0.975])
    if value == 1:  # no draw can differ: the exact interval of the TB images instead
        low, high = metrics.exact_interval(1.0, patients[labels == 1])
    row = {"metric": "auprc", "value": value, "ci_low": low, "ci_high": high, "n": len(labels)}
    return pd.DataFrame([row])


# %%
study = open_study(run)
predictions = pd.read_csv(made_by(run, "predictions.csv", "4 Sensitivity first"))
labels, names = predictions["label"].to_numpy(), list(predictions.columns[2:])
patients, areas = study.patients(study.rows("test")), []
for name in names:
    area = auprc(labels, predictions[name].to_numpy(), patients)
    areas.append(report.result_rows(area, study_of(name).run, model=name))
results = report.update_results(pd.concat(areas), RESULTS)

# %% [markdown]
# Beside the AUPRC stands the precision at the chosen threshold: in this collection, and where one
# person in a hundred is sick.

# %%
share = labels.mean()
columns = ["AUPRC", f"precision at {share:.0%} TB", "precision at 1 % TB"]
worth = pd.DataFrame(index=pd.Index(names, name="model"), columns=columns)
for name, area in zip(names, areas, strict=True):
    own = results[results.model.eq(name) & results.attack.eq("clean, chosen threshold")]
    own = own.set_index("metric")["value"]
    both = [precision_at(own.sensitivity, 1 - own.specificity, at) for at in (share, 0.01)]
    worth.loc[name] = [report.with_interval(area.iloc[0]), *(f"{one:.2f}" for one in both)]
report.show(worth)

# %%
curves = {}
for name in names:
    found, recall, threshold = precision_recall_curve(labels, predictions[name])
    columns = {"threshold": threshold, "precision": found[:-1], "recall": recall[:-1]}
    curve = pd.DataFrame(columns)
    both = curve.precision + curve.recall
    curves[name] = curve.assign(f1=2 * curve.precision * curve.recall / both)
figure = figure_pr(curves, run.caption)
figure.axes[0].axhline(share, color="0.4", ls=":")  # what guessing gives
report.save_figure(figure, run, "precision_recall")
figure

# %% [markdown]
# **What to see in it.** The dotted line is guessing. Follow a curve to the right: the recall at which it
# drops says how many of the sick can be found before false alarms take over. The mark is the highest
# F1, the harmonic mean of precision and recall, on *test* images: it describes the curve and is no
# way to choose a threshold.
#
# **What we learnt.** Compare the two lines of each model: the same network with another threshold finds
# another share of the sick, while its AUC stays. Compare the chosen threshold's sensitivity with what
# was promised on validation images, and read precision only beside the share of sick people it was
# computed for.

# %% [markdown]
# ## 5 Attacks
#
# An attack changes each pixel by at most eps, too little to see, so that the answer changes. The
# simplest is one step, FGSM (fast gradient sign method): ask the gradient which way each pixel has to
# go, and go eps that way. Here on the *validation* images with TB:

# %%
study = open_study(run)
model, rows = load_models(study, ["standard"])["standard"], study.rows("val")
sick = rows[study.labels(rows).cpu().numpy() == 1]
x, y = study.images(sick).requires_grad_(), study.labels(sick)
F.cross_entropy(model(x), y).backward()
x_adv = (x + run.headline_eps * x.grad.sign()).clamp(0, 1)
after = f"after one step of {eps_text(run.headline_eps)}"
for name, images in (("as they are", x), (after, x_adv)):
    print(f"mean P(TB) {name}: {model(images).softmax(1)[:, 1].mean().item():.2f}")


# %% [markdown]
# The suite is that of notebooks 01 and 02: random noise, FGSM, PGD and APGD (auto-PGD, which finds its
# step size itself) with two losses, the searches for the smallest change DeepFool and FMN (fast
# minimum norm), and Square, which sees no gradient. A MeanSparse model is also attacked *straight
# through* its operator (BPDA, backward pass differentiable approximation: for the gradient, the
# operator counts as doing nothing). eps is in grey levels of 255. In the **worst case** an image
# counts as right only if no attack fooled it at this or a smaller eps. First at the models' own
# threshold of 0.5, for the table in the form of the published study; sensitivity and specificity in
# the worst case stand beside it, and their mean. The last line is no model: it is what always
# answering "Normal" scores, whatever the attack.
# The large networks meet a smaller suite (`zoo_suite`), for want of a GPU's time: a gap by which one of them beats
# a MobileNetV2 may be the attacks that it was spared.

# %%
def attacked(name):
    return suite.attack(study_of(name), name).rows


study = open_study(run)
names, found = [*MODELS, *trained(study, run.zoo)], []
test_opened(study, "the suite of attacks in pixel units")
for name, rows in launch.each(attacked, names, log_dir=run.run_dir / "logs").items():
    own = study_of(name)
    report.update_results(report.accuracy_rows(rows, own, model=name), RESULTS)
    how = dict(model=name, attack="worst", eps=run.headline_eps)
    left = report.result_rows(worst_case(rows, own), own.run, **how)
    results = report.update_results(left, RESULTS)
    found.append(report.accuracy_rows(rows[rows.label.eq(1)], own, model=name))

# %%
table = report.attack_table(results, eps=run.headline_eps)
halves = results[results.attack.eq("worst") & results.metric.eq("balanced_accuracy")]
for _, row in halves.iterrows():
    table.loc[row["model"], "balanced, worst case (%)"] = report.with_interval(row, scale=100)
healthy = 1 - study.labels(study.rows("test")).float().mean().item()
table.loc["always Normal"] = [f"{100 * healthy:.0f}"] * 3 + ["0", "100", "50"]
report.show(table)

# %% [markdown]
# Sensitivity against eps: what is left of finding TB. A model that calls everything TB keeps it at 1,
# so read it together with the specificity in the table.

# %%
note = "Images with TB only, worst case"
how = dict(attack="worst", note=note, told_at=run.headline_eps)
figure = plots.figure_accuracy_vs_eps(pd.concat(found), run.caption, **how)
figure.axes[0].set_ylabel("sensitivity")
report.save_figure(figure, run, "sensitivity_vs_eps")
figure


# %% [markdown]
# **What to see in it.** At eps = 0 stands the sensitivity on clean images. What matters is how far a
# line falls on the way to the right, not where it begins. The bands are intervals over the few images
# with TB: wide, since there are few.

# %% [markdown]
# **The TB images that an attack hides.** A clinic would run the model at the threshold of section 4, so
# that is where the price has to be counted. With two logits $z_0, z_1$ the model says TB where
# $z_1 - z_0 > 0$, that is where P(TB) > 0.5. To ask for P(TB) > t, take log(t / (1 - t)) off the last
# bias: the attacks then aim at the very decision that would be used.

# %%
def at_threshold(model, threshold):
    """The model, changed so that its argmax is class 1 exactly where P(class 1) > threshold."""
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.bias[1] -= np.log(threshold / (1 - threshold))
    return model


# %% [markdown]
# Only the images with TB are attacked: how many are missed before, and how many after?

# %%
def hidden(name):
    """The suite of attacks on the TB test images, at the chosen threshold of the model `name`."""
    own = study_of(name)
    rows = own.rows("test")[own.labels(own.rows("test")).cpu().numpy() == 1]

    def compute():
        model = at_threshold(load_models(own, [name])[name], threshold_of(name))
        data = own.images(rows), own.labels(rows)
        options = suite.options(own.run) | {"at": None, "full_at": None, "ids": rows}
        options |= {"in_full": 0}  # what one attack hid is not attacked again
        return evaluate.robust(model, data, [run.headline_eps], **options).rows

    uses = (*suite.USES, "headline_eps", "sensitivity")
    return stored(own, f"hidden_{name}", compute, model=name, uses=uses)


# %%
study = open_study(run)
names, missed = [*MODELS, *trained(study, run.zoo)], []
test_opened(study, "images with TB attacked at the chosen threshold")
for name, rows in launch.each(hidden, names, log_dir=run.run_dir / "logs").items():
    found = report.accuracy_rows(rows, study_of(name), model=name)  # of TB images: sensitivity
    worst = found[found.attack.eq("worst")]
    named = worst.assign(metric="sensitivity", attack="worst, chosen threshold")
    report.update_results(named, RESULTS)
    count = rows[rows.fooled.astype(bool)].groupby("attack").size()
    line = {"model": name, "TB images": int(worst.n.item()), "missed, clean": count.get("clean", 0)}
    line[f"missed, worst case {eps_text(run.headline_eps)}"] = count.get("worst", 0)
    missed.append(line | {"sensitivity, worst case": report.with_interval(worst.iloc[0])})
report.show(pd.DataFrame(missed))

# %% [markdown]
# **Masked gradients.** A model may look robust only because its gradient leads attacks astray. The
# check list of Carlini et al. (*On Evaluating Adversarial Robustness*, 2019,
# [1902.06705](https://arxiv.org/abs/1902.06705)) stands here as checks that can fail. A WARN is a
# finding about the *evaluation* of that model: do not believe its robustness before you know why.

# %%
study = open_study(run)
names, checks = [*MODELS, *trained(study, run.zoo)], []
for name in names:
    told = stored(study_of(name), f"checks_{name}", model=name, section="5 Attacks")
    checks.append(told.assign(model=name))
checks = pd.concat(checks)
warned = checks[checks["verdict"].eq("WARN")]
print(f"{len(checks) - len(warned)} of {len(checks)} checks passed")
if len(warned):
    display(report.show(warned[["model", "check", "verdict", "value"]]))

# %% [markdown]
# Two numbers tell most of it: the gap between PGD on the cross-entropy and PGD on the margin (the
# difference of the logits), and the share of images whose gradient is exactly zero. Both are near 0
# where nothing is masked.

# %%
shares = {name: suite.zero_gradients(study_of(name), name) for name in names}
results = report.update_results(report.zero_gradient_rows(shares, study), RESULTS)
report.show(report.masking_table(results[results.model.isin(names)], eps=run.headline_eps))

# %% [markdown]
# **What we learnt.** Robustness on this task has a direction: compare the worst case's sensitivity and
# specificity, not only its accuracy, and count at the threshold that would be used. Believe a number
# only where no check warns, and never that of a model that gives (nearly) everything one answer.

# %% [markdown]
# ## 6 Where do they look?
#
# The simplest map is the *saliency*: how much does each pixel move the score of TB? That is one
# gradient. How concentrated is it, on one TB image of the validation split?

# %%
study = open_study(run)
model, rows = load_models(study, ["standard"])["standard"], study.rows("val")
x = study.images(rows[study.labels(rows).cpu().numpy() == 1][:1]).requires_grad_()
(slope,) = torch.autograd.grad(model(x)[0, 1], x)
strongest = slope.abs().flatten().sort(descending=True).values
tenth = strongest[: len(strongest) // 10].sum() / strongest.sum()
print(f"the strongest tenth of the pixels holds {tenth:.0%} of the saliency (10 % if it were even)")


# %% [markdown]
# Three methods, for the class *Tuberculosis*, on TB images of the **test** split: saliency,
# integrated gradients (the mean gradient on the way from a black image, times the image) and Grad-CAM
# (the last feature map, weighed by its gradient). The collection marks no findings, so the maps cannot
# be scored here (notebook 02 does it, on fractures): take them as a question, not as evidence.

# %%
def overlays(name, rows):
    """Maps of the test images `rows` over the images, for the model `name`."""
    study = open_study(run)
    model, x = load_models(study, [name])[name], study.images(rows)
    options = {"saliency": {}, "integrated_gradients": {"steps": run.integrated_steps}}
    options |= {"gradcam": {"layer": models.last_map_layer(model)}}
    maps = {m: attribution.explain(m, model, x, 1, **how) for m, how in options.items()}
    error = maps["integrated_gradients"].error.max()
    print(f"{name}: completeness error of integrated gradients, at most {error:.4f}")
    texts = [f"{name}\nP(TB) {p:.2f}" for p in predict(model, x)[0][:, 1]]
    heat = {method: one.heat().cpu().numpy() for method, one in maps.items()}
    how = dict(captions=texts, caption=run.caption)
    figure = figures.figure_overlays(x.cpu().numpy(), heat, **how)
    report.save_figure(figure, run, f"overlays_{name}")
    return figure


# %%
study = open_study(run)
test_opened(study, "maps of TB images")
rows = study.rows("test")[study.labels(study.rows("test")).cpu().numpy() == 1][:3]
figure = overlays("standard", rows)
figure

# %% [markdown]
# **What to see in it.** The *completeness error* says by how much the values of integrated gradients
# fail to add up to what the score gained: more steps (`integrated_steps`) make it smaller. Look for heat outside the lungs, where section 1 asked what the
# edges give away.

# %%
figure = overlays("pgd_at", rows)
figure

# %% [markdown]
# **What to see in it.** Compare the first two maps with those of the plain model: after adversarial
# training gradients are often smoother and follow larger structures. Whether they lie on the disease
# is another question, and not answered here.

# %% [markdown]
# **Does the map depend on the model at all?** From the last layer down, the weights are replaced by
# noise (Adebayo et al., *Sanity Checks for Saliency Maps*, 2018,
# [1810.03292](https://arxiv.org/abs/1810.03292)); a map that explains the model must change.

# %%
study = open_study(run)
model = load_models(study, ["standard"])["standard"]
x = study.images(study.rows("test")[study.labels(study.rows("test")).cpu().numpy() == 1][:6])
uses, randomised = ["maps", "occlusion_window", "seed"], {}
for method, extra in {"saliency": {}, "gradcam": {"layer": models.last_map_layer(model)}}.items():
    how = dict(target=1, steps=4, seed=run.seed) | extra
    done = partial(localisation.sanity, model, x, method, **how)
    name = f"randomised_{method}_standard"
    randomised[method] = stored(study, name, done, model="standard", uses=uses)
figure = figures.figure_randomisation(randomised, run.caption)
report.save_figure(figure, run, "randomised")
figure


# %% [markdown]
# **What to see in it.** A curve that falls to the dotted line of its colour (how alike the maps of two
# different images are) depends on the weights. One that stays high would draw the same map for a
# network that has learnt nothing.
#
# **What we learnt.** A map must first pass a test that it can fail. Where the curves fall, the map
# depends on what was learnt; that it shows the *disease* needs marked findings, which this collection
# does not have.

# %% [markdown]
# ## 7 Another hospital
#
# So far the test images came from where the training images came from. What is left where neither
# was seen? The images of another hospital come in through the door for your own: a folder that holds
# a folder for each class (`Normal`, `Tuberculosis`), named in the setting `external`, such as
# `CHANGES = {"external": "data/shenzhen"}`. Nothing is trained or chosen on them. In the smoke
# profile ("phantom") a second hospital is made up: other phantoms, flatter and darker, behind a
# bright rim.

# %%
def made_up():
    """A second hospital of phantoms with another look; its folder."""
    place, people = run.run_dir / "second_hospital", dict(seed=1, images=(60, 60), size=run.size)
    tree = phantom.write_tuberculosis(place, **people)
    for path in tree.rglob("*.png"):
        image = 0.1 + 0.6 * (np.asarray(Image.open(path)) / 255) ** 1.2
        image[:2], image[:, :2] = 0.9, 0.9
        Image.fromarray((255 * image).astype(np.uint8)).save(path)
    return tree


# %%
def as_test(study, dataset):
    """Images that did not come with the run's, prepared as these: all of them test images."""
    dataset = replace(dataset, manifest=dataset.manifest.assign(split="test"))
    images = cache.build(dataset, size=study.cache.size, fit=study.cache.fit)
    return replace(study, dataset=dataset, cache=images)


# %% [markdown]
# **Are they other images at all?** By its authors' account the collection drew on public sets,
# Shenzhen's among them, and a set from there might hold the very images that were learnt. So the rule
# that kept near-duplicates on one side of the split is asked about all images of both places, and
# what looks like one of the collection's is left out.

# %%
def copies(study, other):
    """Which images of `other` are near-duplicates of the study's: bool [N]."""
    both = [study.dataset.manifest, other.dataset.manifest]
    together = replace(study.dataset, manifest=pd.concat(both, ignore_index=True))
    images = np.concatenate([study.cache.images, other.cache.images])
    looks = split.with_looks(together, images).manifest["look"].to_numpy()
    return np.isin(looks[len(both[0]) :], looks[: len(both[0])])


# %%
def another_hospital(study):
    """The other hospital's images without copies of ours, or None, and how many these were."""
    if not run.external:
        return None, 0
    made = run.external == "phantom"
    folder = made_up() if made else run.external
    how = dict(classes=study.dataset.classes, patient_pattern=run.external_patients)
    dataset = datasets.from_folder(folder, **how)
    dataset = replace(dataset, name="second_hospital") if made else dataset
    again = copies(study, as_test(study, dataset))
    return datasets.take(dataset, np.flatnonzero(~again)), int(again.sum())


# %%
study = open_study(run)
elsewhere, again = another_hospital(study)
if elsewhere is None:
    print('None was named: CHANGES = {"external": "a folder of class folders"} tests one.')
else:
    where = elsewhere.name + " (SYNTHETIC)" * elsewhere.synthetic
    print(f"{where}: {again} near-duplicates of the collection's images were left out, and")
    print(elsewhere.manifest["class_name"].value_counts().to_dict(), "remain.")
    row = {"model": "(none)", "attack": "external, near-duplicates left out", "metric": "images"}
    row |= {"value": again, "n": len(elsewhere.manifest) + again, "data": where, "epochs": 0}
    row["weights"] = "none"
    report.update_results(report.result_rows(pd.DataFrame([row]), run), RESULTS)


# %% [markdown]
# **Ranking, threshold, probabilities.** The AUC asks whether the sick still rank above the healthy,
# sensitivity and specificity whether the threshold that section 4 chose, on images from here, is of
# any use there. The *expected calibration error* (ECE) is the mean gap between P(TB) and the share of
# TB among the images that got it. The networks learnt as if both classes were equally common, and the
# two places have different shares of TB. So the odds are first multiplied by those of TB in each
# place, which a clinic would have to know:

# %%
def at_share(p, sick):
    """P(TB) of a model that learnt from classes of equal weight, where the share `sick` has TB."""
    odds = p / np.clip(1 - p, 1e-12, None) * sick / (1 - sick)
    return odds / (1 + odds)


print("P(TB) = 0.5 means, where one in a hundred is sick:", at_share(np.array([0.5]), 0.01))


# %%
def clean_rows(name, place):
    """Metrics of the model `name` on the test images of `place`, at its chosen threshold."""
    model, rows = load_models(study_of(name), [name])[name], place.rows("test")
    labels, patients = place.labels(rows).cpu().numpy(), place.patients(rows)
    score, how = predict(model, place.torch_set("test"))[0][:, 1], dict(draws=run.bootstrap_draws)
    threshold = threshold_of(name)
    found = metrics.classification(labels, score, patients, threshold=threshold, **how)
    ece = calibration.summary(labels, at_share(score, labels.mean()), patients, **how)
    ece = ece[ece.metric.eq("ece")]
    ideal = pd.DataFrame({"metric": ["ece_if_calibrated"], "value": ece.if_calibrated})
    found = pd.concat([found, ece.drop(columns="if_calibrated"), ideal.assign(n=len(rows))])
    return found.assign(attack="clean, chosen threshold", eps=0.0)


# %% [markdown]
# **Under attack.** At the headline's eps every attack runs on the other hospital's images, or on a
# random part of them (setting `external_attacked`). An image that one attack has turned is not
# attacked again, which leaves the worst case as it is. The threshold is 0.5, as in section 5.

# %%
def attacked_rows(name, place):
    """Metrics in the worst case of the model `name` on (a part of) the images of `place`."""
    rows = np.random.default_rng(run.seed).permutation(place.rows("test"))
    rows = np.sort(rows[: run.external_attacked])

    def compute():
        model = load_models(study_of(name), [name])[name]
        options = suite.options(run) | {"at": None, "ids": rows, "in_full": 0}
        data = place.images(rows), place.labels(rows)
        return evaluate.robust(model, data, [run.headline_eps], **options).rows

    uses = (*suite.USES, "headline_eps", "external_attacked")
    return worst_case(stored(place, f"external_{name}", compute, model=name, uses=uses), place)


# %%
def in_both(name):
    """Metrics of the model `name` by place: here (the test split) and there."""
    own = study_of(name)
    there = as_test(own, elsewhere)
    rows = stored(own, f"robust_{name}", model=name, section="5 Attacks")
    worst = {"here": worst_case(rows, own), "there": attacked_rows(name, there)}
    found = {"here": clean_rows(name, own), "there": clean_rows(name, there)}
    hit = dict(attack="worst", eps=run.headline_eps)
    return {at: pd.concat([clean, worst[at].assign(**hit)]) for at, clean in found.items()}


# %% [markdown]
# The images of the two places are different ones, so the interval of a difference follows from the
# two intervals (Zou and Donner, *Construction of confidence limits about effect measures: a general
# approach*, 2008).

# %%
def change(here, there):
    """Rows there minus rows here, metric by metric, with intervals."""
    both = there.merge(here, on=["attack", "eps", "metric"], suffixes=("", "_here")).dropna()
    value = both["value"] - both["value_here"]
    low = np.hypot(both["value"] - both["ci_low"], both["ci_high_here"] - both["value_here"])
    high = np.hypot(both["ci_high"] - both["value"], both["value_here"] - both["ci_low_here"])
    found = both[["attack", "eps", "metric", "n"]]
    return found.assign(value=value, ci_low=value - low, ci_high=value + high)


# %%
told = [pd.DataFrame(columns=["attack", "metric"])]
names = [*MODELS, *trained(study, run.zoo)] if elsewhere else []
for name, found in launch.each(in_both, names, log_dir=run.run_dir / "logs").items():
    found["change"] = change(**found)
    told += [rows.assign(model=name, place=place) for place, rows in found.items()]
    for place, rows in found.items():
        rows = rows.assign(model=name)
        if place != "here":
            rows["attack"], rows["data"] = "external, " + rows["attack"], where
        rows["metric"] += "_change" * (place == "change")
        results = report.update_results(report.result_rows(rows, study_of(name).run), RESULTS)
told = pd.concat(told)


# %%
def beside(attack, shown):
    """A table of both places, if another hospital was named."""
    rows = told[told["attack"].eq(attack) & told["metric"].isin(shown)]
    if len(rows):
        display(report.show(report.wide(rows, down=["model", "place"], only=shown)))


beside("clean, chosen threshold", ["auc", "sensitivity", "specificity", "ece"])

# %% [markdown]
# And in the worst case. The share of TB differs between the places, and with it what an accuracy means;
# compare the balanced one.

# %%
beside("worst", ["accuracy", "balanced_accuracy", "sensitivity", "specificity"])


# %% [markdown]
# **What to see in it.** An AUC can survive a change of hospital while the threshold does not: a
# network that answers higher throughout finds more of the sick and alarms nearly everybody. The
# threshold is part of the model and has to be tested with it.
#
# **The edges again.** Section 1 asked what parts without lungs give away, where the classes come from
# different hospitals. Here *one* hospital sent both classes. The same thumbnails, learnt here and
# tested here (on validation images, as in section 1), learnt here and tested there, and learnt on one
# half of the other hospital's images and tested on the other half:

# %%
def audits(study, other):
    """What parts of the images give away, by where the probe learnt and where it was tested."""
    rng, tables = np.random.default_rng(run.seed), []

    def part(own, rows):
        return shortcuts.sample(own.dataset, own.cache, own.images(rows), rows)

    learnt = part(study, rng.permutation(study.rows("train"))[:800])
    cases = {("here", "here"): (learnt, part(study, study.rows("val")))}
    cases["here", "there"] = learnt, part(other, other.rows("test"))
    halves = np.array_split(rng.permutation(other.rows("test")), 2)
    cases["there", "there"] = [part(other, half) for half in halves]
    asked = ("whole", "centre_only", "border_only", "corners_only")
    for (learnt_at, tested_at), two in cases.items():
        how = dict(regions=asked, draws=run.bootstrap_draws)
        found = shortcuts.region_accuracy(shortcuts.linear_probe(), *two, **how)
        tables.append(found.assign(learnt=learnt_at, tested=tested_at))
    found = pd.concat(tables)
    return found[found.metric.eq("auc")].drop(columns=["how", "lungs"])


# %%
if elsewhere:
    given = audits(study, as_test(study, elsewhere))
    tested = given.tested.map({"here": run.data_name, "there": where})
    asked = "audit, learnt " + given.learnt + ", tested " + given.tested + " on " + given.region
    rows = given.assign(model="thumbnails", data=tested, attack=asked)
    rows = rows.drop(columns=["learnt", "tested", "region"]).assign(epochs=0, weights="none")
    report.update_results(report.result_rows(rows, run), RESULTS)
    given["region"] = given.region.str.replace("_", " ")
    display(report.show(report.wide(given, "region", down=["learnt", "tested"])))

# %% [markdown]
# **What to see in it.** What a border tells in the first line and no longer in the second belongs to the
# collection, not to the disease. And look at the last line: even images of one hospital can differ at
# their edges with the class, for instance where the sick were imaged in another room, or lying down.
#
# **What we learnt.** A test split drawn from the collection measures the collection. The images of one
# more hospital, with both classes, ask the harder question; they cost an afternoon, and no training.

# %% [markdown]
# ## 8 Verdict
#
# Two models on the *same* images are compared image by image. Where both are right or both wrong
# nothing is learnt about which is better; only the images count that *one of them* has right.
# If the models were equally good, each such image would be the toss of a fair coin: that is McNemar's
# test (*Note on the sampling error of the difference between correlated proportions or percentages*,
# 1947). Who makes several comparisons finds a small p by luck, so Holm (*A simple sequentially
# rejective multiple test procedure*, 1979) multiplies the smallest of k by k, the next by k - 1, and
# so on, and lets none be smaller than the one before.

# %%
only_new, only_old = 9, 1  # images that only one of two models has right
print(f"McNemar: p = {binomtest(only_new, only_new + only_old).pvalue:.3f}")
p = np.array([0.012, 0.020, 0.030])  # three comparisons, the smallest p first
print("Holm:   ", np.minimum(np.maximum.accumulate(p * [3, 2, 1]), 1).round(3))

# %% [markdown]
# Now every model against the plain one, clean and in the worst case. The test is exact and by patient.

# %%
study = open_study(run)
names, per_image = [*MODELS, *trained(study, run.zoo)], {}
for name in names:
    per_image[name] = stored(study_of(name), f"robust_{name}", model=name, section="5 Attacks")
paired = report.paired_tests(per_image, study, eps=run.headline_eps, reference="standard")
files.write_csv(paired, run.run_dir / "paired_tests.csv")
shown = "condition model accuracy reference only_model_right only_reference_right p p_holm".split()
report.show(paired[shown])

# %% [markdown]
# The sentences are written by code from this run's numbers, so that they cannot claim more than it
# shows. First all images, then those with TB at the thresholds of section 4.

# %%
results = pd.read_csv(made_by(run, "results.csv", "5 Attacks"))
masking = report.masking_table(results, eps=run.headline_eps)
Markdown(report.verdict(results, masking, paired, run, reference="standard"))


# %%
def on_tb(name, results):
    """A sentence on the model `name` at its chosen threshold."""
    own = results[results.model.eq(name)].drop_duplicates(["attack", "metric"])
    own = own.set_index(["attack", "metric"])
    hit, spared = (own.loc[("clean, chosen threshold", m)] for m in ("sensitivity", "specificity"))
    held = own.loc[("worst, chosen threshold", "sensitivity")]
    said = f"- **{name}** finds {report.with_interval(hit)} of the {held['n']:.0f} test images with"
    said += f" TB, with false alarms on {1 - spared['value']:.0%} of the healthy; under attack at "
    said += f"{eps_text(run.headline_eps)} it still finds {report.with_interval(held)}."
    if (hit["value"] + spared["value"]) / 2 < 0.6:
        said += " Hardly better than guessing: neither number means anything."
    return said


lines = [f"At thresholds chosen for a sensitivity of {run.sensitivity:g} on validation images:\n"]
Markdown(report.finding(run, lines + [on_tb(name, results) for name in names]))

# %% [markdown]
# **The real study.** 692 images with TB and 2,634 normal ones, split 80 / 10 / 10 with near-duplicates
# kept together; the `cpu` profile (160 px, MobileNetV2 from pretrained features, 10 epochs; attacks of
# 2/255 in training), one seed (0): 334 test images, 70 of them with TB.
#
# <!-- table 03-headline -->
#
# - **On its own collection all is well.** At thresholds chosen on validation images for a sensitivity of
#   0.95 the plain network finds 65 of the 70 and alarms on none of the 264 healthy (AUC 1.00).
# - **Nothing of that is robust**: the plain network has no image right at 1/255, and the linear probe
#   none either.
# - **Training on attacks seems to solve it**: `pgd_at` keeps 0.94 and `trades` 0.96 at 4/255, balanced
#   0.91 and 0.93, with hardly a loss on clean images. All checks of masked gradients pass.
#
# Before anybody believes it, the same networks on 662 images from Shenzhen, with nothing trained or
# chosen there (the worst case on 200 of them):
#
# <!-- table 03-hospitals -->
#
# ![Each network on the collection and in Shenzhen: AUC, sensitivity and the balanced worst case fall, specificity stays](attachment:hospitals.png)
#
# - **What was learnt is this collection.** AUCs of 1.00 become 0.60 to 0.68. At the thresholds that find 91 to
#   93 in 100 of the sick here, the networks find 2 or 3 in 100 there: they call nearly everybody
#   healthy. Their probabilities are off by 0.31 to 0.44, here by 0.02 at most.
# - **Robustness does not travel either.** In the worst case `pgd_at` and `trades` keep 0.43 and 0.42
#   (balanced), less than the 0.5 of always giving the same answer: 0.84 and 0.83 of the healthy, and of the
#   sick 1 in 99 and none. A robust shortcut is still a shortcut.
#
# What gave it away beforehand: thumbnails of which only a part is left (AUC of a logistic regression).
#
# <!-- table 03-edges -->
#
# The border alone tells the collection's classes apart nearly as well as the whole thumbnail does, and
# is worth nothing in Shenzhen. Nor are Shenzhen's own edges clean. So no accuracy on this collection shows
# that a network reads lungs. (The copy from Shenzhen was squashed to a square: part of the fall may be
# that. And one seed is one training.)
#
# Not one of 1,280 scrambled features still resembles its own, and yet a probe on them has an AUC of 0.99
# on validation images, on pooled ones 1.00, with intervals that overlap. (The 0.88 and 0.29 of the
# beginning are the other study's.)
#
# Every number, and what it means: [results](../results/README.md).

# %% [markdown]
# Accuracy on clean images and in the worst case, once more, and the files of this run.

# %%
keep = results.attack.isin(["clean", "worst"])
keep &= results.eps.eq(0) | np.isclose(results.eps, run.headline_eps)
report.show(report.results_table(results[keep]))

# %%
report.written(run)

# %% [markdown]
# **What we learnt.** A difference counts when it is large, stays after Holm's adjustment, and belongs to
# a model that neither guesses nor hides its gradient. Compare the two verdicts: a model can lose
# little accuracy in the worst case and still miss the few who are sick.

# %% [markdown]
# ## Takeaways
#
# - **Accuracy hides what is rare.** Report sensitivity and specificity at a stated threshold, beside what
#   a constant answer reaches.
# - **A network learns in spite of bugs.** That it learns shows nothing; test shapes and inputs.
# - **The threshold is a choice**: make it on validation images, for the sensitivity that is needed, and
#   test it once on images that took no part.
# - **Precision belongs to a population.** Recompute it for the share of sick people where the model is
#   to be used.
# - **Test elsewhere.** A test split of the collection measures the collection; the threshold travels
#   with the model and has to be tested with it.
# - **Robust for whom?** Count the sick that an attack hides, not only the images that it turns.

# %% [markdown]
# ## Exercises
#
# Each solution runs behind the opening cells once the notebook has run.

# %% [markdown]
# **Exercise 1.** A clinic can re-examine only so many healthy people. Turn the choice round: fix the
# share of false alarms (none, 10 %, 50 % of the healthy validation images) and read off how many of the
# sick the plain model finds there.
#
# <details><summary>Solution</summary>
#
# ```python
# study = open_study(run)
# model = load_models(study, ["standard"])["standard"]
# labels = study.labels(study.rows("val")).cpu().numpy()
# score = predict(model, study.torch_set("val"))[0][:, 1]
# for alarms in (0.0, 0.1, 0.5):
#     threshold = np.quantile(score[labels == 0], 1 - alarms)
#     found = (score[labels == 1] > threshold).mean()
#     print(f"alarms on {alarms:.0%}: threshold {threshold:.3f}, finds {found:.0%} of the sick")
# ```
#
# </details>
#
# One sees that more alarms never find fewer of the sick, and from which price on they find no more.

# %% [markdown]
# **Exercise 2.** At which image sizes does the published line of section 2, `avg_pool2d(8)` and then
# `view(-1, C)`, agree with the mean over the map? Try 32, 40, 64 and 96 pixels. Which size is wrong
# without any error message?
#
# <details><summary>Solution</summary>
#
# ```python
# model = robust.create("gairat_wrn_28_10", width=1 / 16).eval()
# for size in (32, 40, 64, 96):
#     images = torch.rand(2, 1, size, size)
#     maps = activations(model, images, models.last_map_layer(model))
#     rows = F.avg_pool2d(maps, 8).reshape(-1, maps.shape[1])
#     pooled = maps.mean((2, 3))
#     right = rows.shape == pooled.shape and torch.allclose(rows, pooled, atol=1e-5)
#     print(f"{size} px: {maps.shape[2]} x {maps.shape[3]} places, {len(rows)} rows, right: {right}")
# ```
#
# </details>
#
# Only 32 pixels are right. At 40 the number of rows fits and no loss complains, but the window covers
# only 8 x 8 of 10 x 10 places: the right and lower edge of the image are not read.

# %% [markdown]
# **Exercise 3.** Two models differ on d images with TB, and the new one wins *all* of them. From which d on
# is McNemar's p below 0.05? And if it is the best of four comparisons (Holm)? Compare with the number
# of TB images in the test split.
#
# <details><summary>Solution</summary>
#
# ```python
# for d in range(4, 10):
#     p = binomtest(d, d).pvalue  # 2 / 2**d
#     print(f"{d} of {d}: p = {p:.3f}, the smallest of four: {min(4 * p, 1):.3f}")
# study = open_study(run)
# sick = study.labels(study.rows("test")).sum().item()
# print(f"images with TB in the test split: {sick}")
# ```
#
# </details>
#
# Alone, six images won out of six are enough; as the best of four comparisons it takes eight. With few
# sick people in a test split, nearly all of them must change sides before a difference can be shown.
