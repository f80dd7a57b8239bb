# %% [markdown]
# # 05 Where is the finding? Detection on radiographs, from boxes to a submission
#
# A classifier says *that* something is wrong with a radiograph. A detector has to say *where*, with
# a box, a label and a confidence, and is then held to it. This notebook trains a Faster R-CNN on
# boxed radiographs (the 880 boxed images of NIH ChestX-ray8, a competition made of them in two
# editions, or the fractures of FracAtlas), measures it the way detection is measured, tests whether
# test-time augmentation helps *here*, and writes a submission that is checked.
#
# **What you get**
#
# | part | question |
# |---|---|
# | 1 Data | Which findings, how large, how many images a patient? What would leak? |
# | 2 Training | Faster R-CNN with warm-up, cosine, accumulation, averaged weights and early stopping |
# | 3 Evaluation | mAP, average precision per class, FROC, each with an interval over patients |
# | 4 Thresholds | Why a threshold cannot be tuned by mAP, and what to tune it by |
# | 5 Looking | True boxes and found boxes, side by side; confidences; boxes per image |
# | 6 Test-time augmentation | Which view helps, by how much, and is that more than chance? |
# | 7 Submission | One row for each id, built and checked, for every edition at hand |
# | 8 Where it looks | EigenCAM on the feature pyramid, and how much of it lies inside the true boxes |
#
# What came out on real images stands in [results/README.md](../results/README.md); the outputs
# stored in this file are from the smoke profile on *synthetic* images: they show what you will see,
# and no finding.
#
# Press *Run All*. Every section also runs alone after the opening cells: trained models and
# finished tables are read back from the run folder.
#
# *For research and teaching. Not a medical device.*

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"  # "smoke" (two minutes), "cpu" (a laptop, an hour), "full" (GPU), or "auto"
DATA_DIR = ""  # empty: find a data set; else the competition's, NIH, FracAtlas, or your own boxes
RUN_NAME = ""  # empty: profile and kind of data
RESUME = True  # True: go on where a run stopped; False: anew; "force": under other settings
CHANGES = {}  # settings of your own, whatever the profile, such as {"epochs": 5}

# %% [markdown]
# **The settings.** FULL is the whole study; CPU and SMOKE are what is smaller on a laptop and in a
# first look. To change one, whatever the profile, write it into `CHANGES` above: `CHANGES =
# {"epochs": 5}`. A typo is told, a changed setting is starred below, and the run gets a folder of
# its own, which takes over whatever the change does not touch.
#
# **Your own boxes**: `DATA_DIR` may be a folder of images with one CSV (columns `file, label, x1,
# y1, x2, y2`, in pixels) or one COCO file. Then nothing is submitted; everything else is as below.

# %% tags=["settings"]
# The data: the first set that is there, whole; images: at most so many for each use (None: all)
FULL = {"dataset": ("dlia", "nih", "fracatlas"), "seed": 0, "size": 1024, "images": None}
FULL |= {"one_per_class": True, "patient_pattern": ""}  # NIH: no image has two boxes of one label
# Faster R-CNN
FULL |= {"arch": "fasterrcnn_resnet50_fpn_v2", "weights": "coco", "trainable_layers": 5}
FULL |= {"freeze_bn": True, "nms": 0.3, "rpn_pre_nms": 1000, "rpn_post_nms": 1000}
FULL |= {"roi_batch": 512, "anchor_sizes": None, "channels": 256, "width": 1.0}
# The recipe of every training; max_minutes is for one fold, None is no limit
FULL |= {"folds": 5, "run_folds": 5, "flip": 0.5, "epochs": 60, "batch_size": 4}
FULL |= {"accumulate": 4, "lr": 5e-3}
FULL |= {"weight_decay": 1e-4, "warmup_epochs": 5, "lr_min": 1e-6, "clip_norm": 1.0, "ema": 0.998}
FULL |= {"patience": 15, "max_minutes": 240.0, "num_workers": 2}
FULL |= {"wbf_iou": 0.5, "bootstrap_draws": 2000}

# %% tags=["settings"]
LIGHT = {"arch": "fasterrcnn_mobilenet_v2_fpn", "run_folds": 1, "accumulate": 1, "lr": 0.02}
LIGHT |= {"patience": None, "warmup_epochs": 1, "clip_norm": 5.0, "num_workers": 0}
CPU = LIGHT | {"size": 384, "weights": "imagenet", "channels": 128, "rpn_pre_nms": 500}
CPU |= {"rpn_post_nms": 200, "roi_batch": 64, "epochs": 14, "batch_size": 8, "ema": 0.995}
SMOKE = LIGHT | {"size": 128, "images": 96, "weights": None, "freeze_bn": False, "width": 0.5}
SMOKE |= {"channels": 64, "rpn_pre_nms": 200, "rpn_post_nms": 64, "roi_batch": 32, "folds": 3}
SMOKE |= {"epochs": 11, "ema": 0.95, "max_minutes": None, "bootstrap_draws": 200}
# Fractures are small, and several in an image; in boxes of your own there may be any number
BY_DATA = {"dlia": {}, "nih": {}, "fracatlas": {"one_per_class": False, "size": 800}}
BY_DATA |= {"*": {"one_per_class": False}}

# %% tags=["start"]
from dlia_utils.run import start

run = start(
    "05_nih_detection",
    dict(full=FULL, cpu=CPU, smoke=SMOKE),
    dict(profile=PROFILE, data_dir=DATA_DIR, run_name=RUN_NAME, resume=RESUME, changes=CHANGES),
    by_data=BY_DATA,
    own_data="boxes",
    trains="2 Training",
    allowed={"ema": (None,), "clip_norm": (None,)},
)
print(run)

# %% tags=["imports"]
import json
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import display

from dlia_utils import files, launch, plots, report, submission
from dlia_utils.data import cache, datasets, split
from dlia_utils.detect import evaluate, figures, fuse, views
from dlia_utils.detect.folds import (
    DETECTOR,
    RECIPE,
    folds,
    matches,
    on_images,
    open_detection,
    targets,
    train_fold,
    truth,
)
from dlia_utils.explain.eigencam import activations, eigencam, energy_inside
from dlia_utils.run import submissions_root
from dlia_utils.study import load_models, made_by, stored, test_opened


# %% [markdown]
# **What the sections share.** A fold's model looks at its images once, in every view; its boxes are
# kept in the run folder. `joined` makes one table of the boxes of several views: by weighted boxes
# fusion (WBF), or by suppression (NMS).

# %% tags=["yours"]
def look(study, fold, which):
    """Boxes of a fold's model on its "select" or "score" images, in every view."""

    def compute():
        model = load_models(study, [fold.name])[fold.name]
        options = {"views": views.VIEWS, "batch_size": run.batch_size}
        return views.predict(model, study.cache, getattr(fold, which), **options)

    uses = ("size", "images", "folds", "seed")
    return stored(study, f"boxes_{which}_{fold.name}", compute, model=fold.name, uses=uses)


def joined(found, method="wbf", used=(0,)):
    """One table of boxes from the views with the numbers `used`; one view alone stays as it is."""
    table = found[found["view"].isin(used)].drop(columns="view").reset_index(drop=True)
    if len(used) > 1 and method == "wbf":
        table = fuse.wbf(table, iou=run.wbf_iou, views=len(used))
    elif len(used) > 1:
        table = fuse.nms(table, iou=run.nms)
    return fuse.one_per_class(table) if run.one_per_class else table


# %% [markdown]
# What is compared: the plain view, each other view joined with it, and all views in two ways.
# Results go into the run's `results.csv`, a class's row under its name. Pictures show boxes from
# the threshold on that section 4 chose.

# %% tags=["yours"]
EVERY = range(len(views.VIEWS))
RECIPES = {"plain": ("wbf", (0,))}
RECIPES |= {f"plain + {view.name}": ("wbf", (0, n)) for n, view in enumerate(views.VIEWS) if n}
RECIPES |= {f"all views, {method}": (method, EVERY) for method in ("nms", "wbf")}


def record(study, table, model):
    """Rows metric, label, value, ci_low, ci_high, n into results.csv; label "all": all classes."""
    names = {"all": ""}
    names |= {k: f" {name}" for k, name in enumerate(study.dataset.box_classes, 1)}
    named = table.assign(metric=table["metric"] + table["label"].map(names)).drop(columns="label")
    rows = report.result_rows(named, run, model=model)
    report.update_results(rows, run.run_dir / "results.csv")


def shown_threshold():
    """The score with the best F1 over all classes on the select images; 0.5 where none is best."""
    table = pd.read_csv(made_by(run, "thresholds.csv", "4 Thresholds"))
    pooled = table["objective"].eq("best F1") & table["label"].eq("all")
    best = table.loc[pooled, "threshold"].item()
    return 0.5 if np.isnan(best) else best


# %% [markdown]
# ## 1 The data
#
# Three published layouts become one table of boxes: corners in pixels of the original file, labels
# counted **from 1**. That last point is not bookkeeping. In torchvision's detectors label 0 is the
# background; number eight findings from 0 to 7 and the first one can never be found, however long
# you train. (It happened to the study we redo: the class was Atelectasis, the most frequent one,
# and nothing crashed.)

# %%
study = open_detection(run)
display(datasets.box_summary(study.dataset).round(2))
display(datasets.summary(study.dataset))
study.dataset.ignored["reason"].value_counts().rename("not used").to_frame()

# %% [markdown]
# *Not used* is worth reading. One edition of the competition was split by **row** and not by image,
# so some images stand in its training table and in its test mapping. Training on them would be
# training on the answer: these rows are refused.
#
# Sizes decide how hard a class is. A nodule covers half a per cent of a image, an enlarged heart
# thirty times as much.

# %%
boxes, classes = study.dataset.boxes, list(study.dataset.box_classes)
side = ((boxes["x2"] - boxes["x1"]) * (boxes["y2"] - boxes["y1"])) ** 0.5
figure, axes = plots.panels(2, rows=2, width=5.2, height=3.3)
(count, size), (per_image, per_patient) = axes
numbers = boxes["label"].value_counts().reindex(range(1, len(classes) + 1), fill_value=0)
bars = count.barh(classes, numbers, color=plots.COLORS[0])
count.set(xlabel="boxes", title="boxes per class", xlim=(0, 1.15 * numbers.max()))
count.bar_label(bars)
spread = np.random.default_rng(0).uniform(-0.3, 0.3, len(boxes))
size.plot(side, boxes["label"] - 1 + spread, ".", ms=4, alpha=0.35, color=plots.COLORS[0])
groups = [side[boxes["label"].eq(label)] for label in numbers.index]
size.boxplot(groups, orientation="horizontal", positions=numbers.index - 1, showfliers=False)
size.set(xlabel="square root of the area, px of the file", title="box size: points, quartiles")
size.set_yticks(range(len(classes)), [""] * len(classes))
for axis in (count, size):
    axis.set_ylim(len(classes) - 0.4, -0.6)
patients, manifest = study.dataset.manifest["patient"].value_counts(), study.dataset.manifest
for axis, sizes in ((per_image, boxes["image"].value_counts()), (per_patient, patients)):
    sizes.value_counts().sort_index().plot.bar(ax=axis, rot=0, color=plots.COLORS[0])
    axis.bar_label(axis.containers[0])
per_image.set(xlabel="boxes per image", ylabel="images with a box")
told = f"{len(patients)} patients, {len(manifest)} images, {manifest['patient'].isna().sum()}"
per_patient.set(xlabel="images of one patient", ylabel="patients", title=f"{told} unknown")
report.save_figure(figures.finish(figure, run.caption), run, "data")
figure

# %% [markdown]
# **The split** keeps each patient on one side. A random split by image would put a quarter of the
# NIH validation images beside another image of the same patient in training. Where a data set has
# an official split it is kept; otherwise folds are drawn by patient: fold *k* is scored, fold *k +
# 1* chooses (epoch, thresholds, fusion), the rest trains. So no image is scored by a model that saw
# its patient or was chosen by it.

# %%
uses = [
    {"fold": f.name, "train": len(f.train), "select": len(f.select), "score": len(f.score)}
    for f in folds(study)
]
display(pd.DataFrame(uses))
pd.set_option("display.max_colwidth", 110)
split.audit(study.dataset)

# %% [markdown]
# A few training images with their true boxes:

# %%
shown = folds(study)[0].train[:3]
known = truth(study, shown)
images = on_images(study, shown, known, known.iloc[:0])
figure = figures.figure_boxes(*images, study.dataset.box_classes, run.caption)
report.save_figure(figure, run, "samples")
figure

# %% [markdown]
# ## 2 Training
#
# A Faster R-CNN in two stages: a proposal network says where *something* is, a head says what it is
# and moves the box. The recipe is that of the study we redo, minus its faults:
#
# | there | here |
# |---|---|
# | the last incomplete group of batches was thrown away in every epoch | it is stepped, every image with the same weight |
# | warm-up by epochs, and a cosine that never arrived | both over the real number of steps |
# | "best" weights were an alias of the last ones | copied and saved; reading them back gives the logged score |
# | augmentation arguments that the library ignored with a warning | unknown arguments are errors |
# | every loader worker drew the same random numbers | they depend on seed, epoch and image only |
#
# Added: averaged weights (EMA), frozen batch norms when the weights are pretrained, resuming, a
# time budget. With two GPUs the folds run side by side, one on each.

# %%
study = open_detection(run)
uses = {"detector": run.pick(*DETECTOR), "recipe": run.pick(*RECIPE), "flip": run.flip}
by_name = {fold.name: fold for fold in folds(study)}


def train_one(name):
    """Train a fold, or read the finished one back; `launch.each` puts one on each GPU."""
    fitted = train_fold(study, by_name[name], **uses)
    row = {"fold": name, "epochs": len(fitted.history), "best_epoch": fitted.best_epoch}
    return row | {"best mAP50": fitted.best_score, "minutes": fitted.seconds / 60}


rows = launch.each(train_one, list(by_name), log_dir=run.run_dir / "logs")
pd.DataFrame(rows.values()).round(3)

# %%
history = pd.read_csv(made_by(run, f"{folds(study)[0].name}/metrics.csv", "2 Training"))
best = history.loc[history["val_mAP50"].idxmax()]
figure, axes = plots.panels(2, width=5.2, height=3.4)
left, right = axes[0]
left.plot(history["epoch"], history["train_loss"], "o-", ms=3, color=plots.COLORS[0])
left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
rate = left.twinx()
rate.plot(history["epoch"], history["lr"], "--", lw=1, color="0.5")
rate.set(ylabel="learning rate (dashed)", ylim=(0, None))
right.plot(history["epoch"], history["val_mAP50"], "o-", ms=3, color=plots.COLORS[0])
right.plot(best["epoch"], best["val_mAP50"], "*", ms=12, color=plots.COLORS[1])
right.set(xlabel="epoch", ylabel="validation mAP at IoU 0.5", ylim=(0, None))
right.set_title(f"best: {best['val_mAP50']:.3f} in epoch {best['epoch']:.0f}")
report.save_figure(figures.finish(figure, run.caption), run, "training")
figure

# %% [markdown]
# ## 3 Evaluation
#
# A found box counts as a hit when it overlaps a true box of its label by at least half (IoU 0.5)
# and no more confident box has claimed it. Sort all boxes by confidence, and two curves follow:
# precision against recall, whose area is the **average precision** (its mean over the classes is
# mAP), and **FROC**, sensitivity against false marks per image, the curve radiologists read. Both
# come from one matching pass, down to confidence 0.001: cutting low confidences away beforehand can
# only lower mAP.
#
# The scored images are read here for the first time. The intervals draw patients, not images, with
# replacement.

# %%
study = open_detection(run)
classes = study.dataset.box_classes
test_opened(study, "evaluation of the plain view")
scored = np.concatenate([fold.score for fold in folds(study)])
views_found = pd.concat([look(study, fold, "score") for fold in folds(study)])
own = matches(study, scored, joined(views_found), iou=evaluate.COCO_IOUS)
patients, draws = study.patients(scored), run.bootstrap_draws
asked = ("mAP50", "mAP50_95", "froc_mean", "sensitivity_at_1")
headline = evaluate.bootstrap(own, patients, draws=draws, statistics=asked)
record(study, headline, model="plain")
report.interval_table(headline)

# %% [markdown]
# **Per class.** Average precision, and what a box of that class would be worth at the best
# threshold *for these images* (the honest ones, chosen on other images, follow in section 4). A
# class with twenty boxes has an interval as wide as the scale; do not rank classes by it.

# %%
per_class = evaluate.bootstrap(own, patients, draws=draws, statistics=("AP50",))
record(study, per_class, model="plain")
known = truth(study, scored).groupby("label")["image"].agg(boxes="size", images="nunique")
cells = [report.with_interval(r) if r["value"] >= 0 else "-" for _, r in per_class.iterrows()]
table = known.reindex(own.labels, fill_value=0).assign(AP50=cells)
best = evaluate.best_thresholds(own).set_index("label").drop(columns="fp_per_image")
table.join(best.astype(float).round(3)).set_axis(list(classes))

# %% [markdown]
# FROC. The line of all classes counts every false mark of a image, a class's line only its own:
# compare classes with each other, not with the pooled line.

# %%
curves = {"all classes": evaluate.curve(own)}
if len(classes) > 1:
    curves |= {name: evaluate.curve(own, label) for label, name in enumerate(classes, 1)}
figure = figures.figure_froc(curves, run.caption)
report.save_figure(figure, run, "froc")
figure

# %%
figure = figures.figure_pr(curves, run.caption)
report.save_figure(figure, run, "precision_recall")
figure

# %% [markdown]
# ## 4 Thresholds
#
# The study we redo tried confidences from 0.05 to 0.40, kept the one with the best mAP, and found
# the smallest. It always will: a cut removes boxes from the end of the ranking, and average
# precision is never lower with them than without. The left panel shows it. A threshold is a choice
# between misses and false marks, so it is made by F1, or by a number of false marks per image that
# a reader would bear.

# %%
study = open_detection(run)
classes = study.dataset.box_classes
chosen_on = np.concatenate([fold.select for fold in folds(study)])
views_found = pd.concat([look(study, fold, "select") for fold in folds(study)])
selecting = matches(study, chosen_on, joined(views_found))
sweep = evaluate.threshold_sweep(selecting)
best = evaluate.best_thresholds(selecting, objective="f1")
sweep.round(4)

# %%
pooled = best[best["label"].eq("all")].iloc[0]
figure, axes = plots.panels(2, width=4.8, height=3.6)
left, right = axes[0]
left.plot(sweep["threshold"], sweep["mAP50"], "o-", color=plots.COLORS[0])
left.set(xlabel="score cut", ylabel="mAP at IoU 0.5", title="a cut can only lower mAP")
left.set_ylim(0, max(1.15 * sweep["mAP50"].max(), 0.05))
for number, name in enumerate(("f1", "precision", "recall")):
    right.plot(sweep["threshold"], sweep[name], label=name, **plots.line_style(number))
right.set(xlabel="score cut", ylim=(-0.02, 1.05), title="no cut keeps a true positive")
if np.isfinite(pooled["threshold"]):
    right.axvline(pooled["threshold"], color="0.4", ls="--", label="best f1")
    head = f"best f1 {pooled['f1']:.2f} at {pooled['threshold']:.2f}"
    right.set_title(f"{head}: {pooled['fp_per_image']:.2g} false positives per image")
right.legend(frameon=False)
report.save_figure(figures.finish(figure, run.caption), run, "thresholds")
figure

# %% [markdown]
# Chosen on the *select* images, per class and for all together, by F1 and by one false mark per
# image:

# %%
by_marks = evaluate.best_thresholds(selecting, objective="froc", fp_per_image=1.0)
both = {"best F1": best, "1 false mark per image": by_marks}
table = pd.concat(both, names=["objective"]).reset_index("objective")
files.write_csv(table, run.run_dir / "thresholds.csv")
table.assign(label=table["label"].replace(dict(enumerate(classes, 1)))).round(3)

# %% [markdown]
# ## 5 Looking
#
# Numbers do not show *how* a detector errs. Green and solid: the true box. Red and dashed: found,
# with its confidence, above the F1 threshold of section 4.

# %%
study, threshold = open_detection(run), shown_threshold()
classes, fold = study.dataset.box_classes, folds(study)[0]
found = joined(look(study, fold, "score"))
shown = np.random.default_rng(run.seed).permutation(fold.score)[:4]
images = on_images(study, shown, truth(study, fold.score), found)
figure = figures.figure_boxes(*images, classes, run.caption, threshold=threshold)
report.save_figure(figure, run, "grid")
figure

# %% [markdown]
# One of them again, truth on the left and prediction on the right:

# %%
images = on_images(study, shown[1:2], truth(study, fold.score), found)
figure = figures.figure_boxes(*images, classes, run.caption, threshold=threshold, beside=True)
report.save_figure(figure, run, "beside")
figure

# %% [markdown]
# **Confidences.** If hits and misses had the same distribution, the score would say nothing. Beside
# it: how many boxes an image gets at the threshold.

# %%
own = matches(study, fold.score, found)
figure, axes = plots.panels(2, width=5.2, height=3.4)
left, right = axes[0]
for number, name in ((1, "false"), (0, "true")):
    score = own.score[own.hit[0] == (name == "true")]
    style = {"color": plots.COLORS[number], "ls": ["-", "--"][number], "lw": 1.6}
    style |= {"histtype": "step", "log": True}
    left.hist(score, np.linspace(0, 1, 41), label=f"{name} positives ({len(score)})", **style)
left.set(xlabel="score", ylabel="predictions (log scale)")
left.legend(frameon=False)
reached = found.loc[found["score"] >= threshold, "image"].value_counts()
numbers = reached.reindex(fold.score, fill_value=0)
numbers.value_counts().sort_index().plot.bar(ax=right, rot=0, color=plots.COLORS[0])
right.bar_label(right.containers[0])
right.set(xlabel="predictions per image", ylabel="images")
none = f"{numbers.eq(0).mean():.0%} of {len(numbers)} images without any"
right.set_title(f"score at least {threshold:.3g}: {numbers.mean():.2f} per image, {none}")
report.save_figure(figures.finish(figure, run.caption), run, "scores")
figure


# %% [markdown]
# ## 6 Test-time augmentation
#
# Show the image again, a little smaller, larger, mirrored, darker, brighter; join the boxes. Two
# faults made it void in the study we redo: its "0.9x" image was resized back to 1024 by the model
# itself, so it was only blurred; and its brightness was random, so the same image gave two answers.
# Here the scale is set **inside** the model's own transform, every factor is fixed, and each way
# back is tested to be exact.
#
# Does it help? That is an empirical question with a paired answer: the same bootstrap draws for
# both sides. An interval that crosses zero says "not shown". *All views* are joined in two ways:
# suppression (NMS), which keeps the most confident of overlapping boxes, and weighted boxes fusion
# ([1910.13302](https://arxiv.org/abs/1910.13302)), which averages them and lowers a box that few
# views saw.

# %%
def compare(study, rows, found):
    """mAP of every recipe with its interval, and its paired difference to the plain view."""
    options = {"draws": run.bootstrap_draws, "statistics": ("mAP50",)}
    patients, plain = study.patients(rows), matches(study, rows, joined(found))
    table = []
    for name, recipe in RECIPES.items():
        own = matches(study, rows, joined(found, *recipe))
        value = evaluate.bootstrap(own, patients, **options).iloc[0]
        change = evaluate.bootstrap(own, patients, less=plain, **options).iloc[0]
        row = {"name": name, **value[["value", "ci_low", "ci_high"]], "n": len(rows)}
        row |= {"difference": change["value"], "difference_low": change["ci_low"]}
        table.append(row | {"difference_high": change["ci_high"]})
    return pd.DataFrame(table)


# %% [markdown]
# First on the *select* images, where the recipe for the submission is chosen:

# %%
study = open_detection(run)
chosen_on = np.concatenate([fold.select for fold in folds(study)])
views_found = pd.concat([look(study, fold, "select") for fold in folds(study)])
on_select = compare(study, chosen_on, views_found)
recipe = on_select.loc[on_select["value"].idxmax(), "name"]
files.write_json({"recipe": recipe}, run.run_dir / "recipe.json")
print("chosen for the submission:", recipe)
on_select.round(4)

# %% [markdown]
# Then on the *score* images, which chose nothing:

# %%
test_opened(study, "comparison of views and fusions")
scored = np.concatenate([fold.score for fold in folds(study)])
views_found = pd.concat([look(study, fold, "score") for fold in folds(study)])
on_score = compare(study, scored, views_found)
gains = {"difference": "value", "difference_low": "ci_low", "difference_high": "ci_high"}
parts = [
    on_score[["name", "n", *gains.values()]].assign(metric="mAP50"),
    on_score[["name", "n", *gains]].rename(columns=gains).assign(metric="mAP50_gain"),
]
for name, rows in pd.concat(parts).groupby("name", sort=False):
    record(study, rows.drop(columns="name").assign(label="all"), model=name)
figure = figures.figure_tta(on_score, run.caption)
report.save_figure(figure, run, "tta")
figure

# %% [markdown]
# And fusion against suppression, directly: all views joined by WBF less all views joined by NMS.

# %%
wbf, nms = (matches(study, scored, joined(views_found, how, EVERY)) for how in ("wbf", "nms"))
options = {"draws": run.bootstrap_draws, "statistics": ("mAP50",)}
change = evaluate.bootstrap(wbf, study.patients(scored), less=nms, **options)
change = change.assign(metric="mAP50_wbf_less_nms")
record(study, change, model="all views, wbf")
report.interval_table(change)

# %% [markdown]
# ## 7 Submission
#
# A submission has one row for **each id of the mapping**, not for each image: in one edition of the
# competition three images have two ids, and the n-th id gets the n-th best distinct box. The best
# box is submitted whatever its confidence: a dummy box in the corner is a certain miss, a doubtful
# box is not. Only a image without any box gets the most frequent class's median box.
#
# Every fold's model looks at every test image; all their boxes are fused as one large set of views.
# `submission.write` checks before it writes and reads the file back afterwards. The label is
# spelled `Infiltrate`: rows with `Infiltration` score nothing, without a word from the competition.

# %%
study = open_detection(run)
recipe = json.loads(made_by(run, "recipe.json", "6 Test-time augmentation").read_text())["recipe"]
method, used = RECIPES[recipe]


def boxes_on(target, images):
    """One table of boxes on the test images, from all folds' models in the views of the recipe."""
    looks, parts = [views.VIEWS[number] for number in used], []
    for number, fold in enumerate(target.folds):
        model = load_models(study, [fold.name])[fold.name]
        options = {"views": looks, "batch_size": run.batch_size}
        found = views.predict(model, images, target.rows, **options)
        parts.append(found.assign(view=found["view"] + number * len(looks)))
    return joined(pd.concat(parts), method, range(len(looks) * len(parts)))


# %% [markdown]
# The prior is the median box of each class in training. Then, for each edition:

# %%
trained_on = np.unique(np.concatenate([fold.train for fold in folds(study)]))
shapes = {row: study.cache.shapes[row][::-1] for row in trained_on}
options = {"prior": submission.class_prior(truth(study, trained_on), shapes)}
options["classes"] = classes = study.dataset.box_classes
for target in targets(study):
    images = cache.build(target.dataset, size=run.size, fit="pad")
    names = {row: Path(target.dataset.manifest["path"][row]).name for row in target.rows.tolist()}
    frames = {row: tuple(images.shapes[row][::-1].tolist()) for row in names}
    found = boxes_on(target, images)
    table = submission.build(found, target.mapping, names=names, sizes=frames, **options)
    path = submissions_root() / f"{target.name}_{run.run_dir.name}.csv"
    sizes = {name: frames[row] for row, name in names.items()}
    submission.write(table, path, target.mapping, images=sizes, classes=classes)
    count = table["image_id"].nunique()
    print(f"{target.name}: {len(table)} rows for {count} images -> {path.name}")
display(table.head())

# %% [markdown]
# The same check from the command line: `python -m dlia_utils submission check FILE --mapping
# ID_to_Image_Mapping.csv --images test/`. Here is what it says to a file with the wrong spelling
# and a box turned inside out:

# %%
broken = table.astype({"label": "object"}).copy()
broken.loc[0, "label"] = "Infiltration"
broken.loc[1, ["x_min", "x_max"]] = broken.loc[1, ["x_max", "x_min"]].tolist()
try:
    submission.check(broken, target.mapping, images=sizes, classes=classes)
except submission.SubmissionError as error:
    print(error)

# %% [markdown]
# ## 8 Where it looks
#
# EigenCAM ([2008.00299](https://arxiv.org/abs/2008.00299)) projects a layer's activations on their
# first principal component: where does the pyramid respond most? No class, no gradient, so it
# explains the *attention* of the layer, not a decision; and it is as coarse as the layer (one cell
# is a thirtieth of the image's side in the smoke profile). The table says what share of the map
# lies inside the true boxes, beside the share of the area those boxes cover; a map that ignores the
# findings scores the second number.

# %%
study, threshold = open_detection(run), shown_threshold()
classes, fold = study.dataset.box_classes, folds(study)[0]
model = load_models(study, [fold.name])[fold.name]
shown = np.random.default_rng(run.seed).permutation(fold.score)[:2]
x = study.images(shown)
maps = eigencam(activations(model, x, "rcnn.backbone", level="0"), size=run.size)
found = joined(look(study, fold, "score"))
images = on_images(study, shown, truth(study, shown), found)
options = {"threshold": threshold, "maps": maps.cpu().numpy()}
figure = figures.figure_boxes(*images, classes, run.caption, **options)
report.save_figure(figure, run, "eigencam")
figure

# %%
rows = fold.score[:64]
maps = eigencam(activations(model, study.images(rows), "rcnn.backbone", level="0"), size=run.size)
_, known, _, _ = on_images(study, rows, truth(study, rows), found)
names = ["map inside the boxes", "area of the boxes"]
inside = pd.DataFrame(energy_inside(maps, known), columns=names)
inside.describe().loc[["mean", "std"]].round(3)

# %% [markdown]
# ## Results and files

# %%
results = pd.read_csv(made_by(run, "results.csv", "3 Evaluation"))
cells = results.assign(cell=[report.with_interval(row) for _, row in results.iterrows()])
display(cells[["model", "metric", "cell", "n"]])
written = sorted(
    p.relative_to(run.run_dir).as_posix() for p in run.run_dir.rglob("*") if p.is_file()
)
print(f"{len(written)} files in {run.run_dir.parent.name}/{run.run_dir.name}:")
print("\n".join(name for name in written if "tables/" not in name))
