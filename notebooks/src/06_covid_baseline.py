# %% [markdown]
# # 06 COVID-19: a network from scratch, searched honestly
#
# A small convolutional network learns to tell chest images with COVID-19 from normal ones. That is easy to do and
# easy to do wrong: an image that lies in training and test alike, a statistic taken over all images, a number of epochs
# chosen on the test split, and the result means nothing. This notebook goes the whole way of a course assignment
# (its tasks 1 and 2), with the rules kept by code: choices read validation images only, near-duplicates stay together,
# and the test split is opened once.
#
# **What you get**
#
# | part | question |
# |---|---|
# | 1 Data | Sizes, classes, grey values, image quality; are the splits alike, and do images occur twice? |
# | 2 From image to input | How many pixels are needed? Which normalisation? |
# | 3 Augmentation | What each step does to an image, alone and combined |
# | 4 The first network | Architecture, thirty epochs, and what the curves say |
# | 5 Search | Four hyper-parameters, ranges that widen themselves, hopeless runs cut short |
# | 6 Early stopping | How many epochs; do another optimiser or loss help? |
# | 7 The final baseline | Retrained on training and validation images; saved, reloaded, bit-equal |
# | 8 The test, once | Metrics with intervals, confusion matrix, images with their answers |
# | Questions | The assignment's questions 1-12, answered from this run's numbers; where 13-24 are answered |
#
# [Notebook 07](07_covid_transfer_gradcam.ipynb) goes on with transfer learning, Grad-CAM, and the question what
# the networks really read. Results on real images stand in [results/README.md](../results/README.md); the outputs stored in this
# file are from the smoke profile on *synthetic* images, and only show what you will see.
#
# *For research and teaching. Not a medical device.*

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"  # "smoke" (a minute), "cpu" (a laptop, twenty minutes), "full" (GPU), or "auto"
DATA_DIR = ""  # empty: find it; else the folder that holds it, or your own: one of class folders
RUN_NAME = ""  # empty: profile and kind of data
RESUME = True  # True: go on where a run stopped; False: anew; "force": under other settings
CHANGES = {}  # settings of your own, whatever the profile, such as {"trials": 12}

# %% [markdown]
# **The settings.** FULL is the whole study; CPU and SMOKE are what is smaller on a laptop and in a first look. To change
# one, whatever the profile, write it into `CHANGES` above: `CHANGES = {"epochs": 5}`. A typo is told, a changed setting
# is starred below, and the run gets a folder of its own, which takes over whatever the change does not touch.
#
# **Your own images**: `DATA_DIR` may be any folder with a folder of images for each class (below `train`, `val` and
# `test` if you have a split). A CSV in it with the columns `file` and, as you have them, `label`, `patient`, `split`
# says more. Without patients every image counts as one: `patient_pattern` reads them from the file names.

# %% tags=["settings"]
# The data; unusable_share: at most so many files may fail to decode
FULL = {"dataset": "covid", "seed": 0, "size": 128, "fit": "squash", "per_class": None}
FULL |= {"unusable_share": 0.01}
FULL |= {"val_share": 0.15, "test_share": 0.15, "classes": None, "patient_pattern": ""}
# The network: width is that of its first block, every further block has twice as many channels
FULL |= {"blocks": 4, "width": 16, "hidden": 128, "dropout": 0.3}
# The recipe; max_minutes is for one training, None is no limit
FULL |= {"epochs": 30, "batch_size": 32, "lr": 1e-3, "patience": 8, "max_minutes": 120.0}
FULL |= {"num_workers": 2}
# Quick comparisons of sizes and normalisations
FULL |= {"quick_images": 2000, "quick_epochs": 5}
# The search; of batch and width: (values beyond, values, values beyond)
FULL |= {"trials": 30, "extend": 3, "search_epochs": 15, "search_patience": 5}
FULL |= {"search_lr": (3e-4, 1e-2)}
FULL |= {"search_dropout": (0.1, 0.6), "search_batch": ((8,), (16, 32, 64), (128,))}
FULL |= {"search_width": ((4,), (8, 16, 32), (64,)), "bootstrap_draws": 2000}

# %% tags=["settings"]
CPU = {"size": 96, "epochs": 15, "patience": 4, "num_workers": 0, "quick_epochs": 3, "trials": 10}
CPU |= {"extend": 2}
CPU |= {"search_epochs": 6, "search_patience": 3, "search_width": ((4,), (8, 16), (32,))}

SMOKE = {"size": 48, "per_class": 90, "blocks": 3, "width": 8, "hidden": 32, "epochs": 10}
SMOKE |= {"batch_size": 16}
SMOKE |= {"lr": 2e-3, "patience": 4, "max_minutes": None, "num_workers": 0, "quick_epochs": 3}
SMOKE |= {"trials": 4}
SMOKE |= {"extend": 1, "search_epochs": 4, "search_patience": 4, "search_lr": (5e-4, 4e-3)}
SMOKE |= {"search_batch": ((4,), (8, 16), (32,)), "search_width": ((4,), (8, 16), (32,))}
SMOKE |= {"bootstrap_draws": 200}

# %% tags=["start"]
from dlia_utils.run import start

run = start(
    "06_covid_baseline",
    dict(full=FULL, cpu=CPU, smoke=SMOKE),
    dict(profile=PROFILE, data_dir=DATA_DIR, run_name=RUN_NAME, resume=RESUME, changes=CHANGES),
    own_data="any",
    trains="7 The final baseline",
)
print(run)

# %% tags=["imports"]
import itertools
import json

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dlia_utils import files, launch, metrics, models, plots, report, search
from dlia_utils.data import augment, explore, split
from dlia_utils.device import fingerprint
from dlia_utils.objectives import cross_entropy
from dlia_utils.study import (
    fit_model,
    load_models,
    made_by,
    open_study,
    predictions,
    scores,
    test_opened,
    work_folder,
)
from dlia_utils.train import predict

TABLES, RESULTS = run.run_dir / "tables", run.run_dir / "results.csv"
pd.set_option("display.max_colwidth", 120)


def channels(width):
    """Channels of the blocks: each has twice as many as the one before."""
    return [width * 2**block for block in range(run.blocks)]


def network(study, *, width, dropout):
    """A fresh network that normalises by mean and deviation of all pixels of the TRAINING
    images."""
    mean, spread = explore.mean_and_spread(study.cache, study.rows("train"))
    std = np.sqrt((spread**2 + mean**2).mean() - mean.mean() ** 2)
    return models.cnn(
        num_classes=len(study.dataset.classes),
        channels=channels(width),
        hidden=run.hidden,
        dropout=dropout,
        mean=mean.mean(),
        std=std,
        seed=run.seed,
    )


def score_of(probability):
    """What the metrics take: the probability of class 1, or of more than two classes all of
    them."""
    return probability[:, 1] if probability.shape[1] == 2 else probability


# %% tags=["yours"]
# Rules for reading training curves, so that every sentence about one can be checked.
RISE = 0.1  # of the lowest validation loss: a later loss so much higher is a sign of overfitting
GAP = 0.05  # training accuracy above validation accuracy: another one
JUMPS = 0.25  # mean step of the validation loss from epoch to epoch, as a share of its median
WEAK = 0.8  # a training accuracy below this, while the loss still falls: underfitting


def facts(histories):
    """What the curves of some trainings say, one row each; NaN where there is no validation."""
    columns, rows = "train_loss train_accuracy val_loss val_accuracy val_auc".split(), []
    for name, history in histories.items():
        table = history.set_index("epoch").reindex(columns=columns)
        loss, accuracy, val_loss, val_accuracy, auc = (table[column] for column in columns)
        later = val_loss.iloc[len(val_loss) // 2 :] if len(val_loss) > 3 else val_loss
        row = {"run": name, "epochs": len(table), "train_loss_first": loss.iloc[0]}
        row |= {"train_loss_last": loss.iloc[-1], "falls": (loss.diff().iloc[1:] < 0).mean()}
        row["train_accuracy_last"] = accuracy.iloc[-1]
        row["best_epoch"] = auc.idxmax() if auc.notna().any() else np.nan
        row |= {"val_auc_best": auc.max(), "val_auc_last": auc.iloc[-1]}
        row["val_loss_epoch"] = val_loss.idxmin() if val_loss.notna().any() else np.nan
        row["val_loss_rise"] = val_loss.iloc[-1] / val_loss.min() - 1
        row["gap"] = accuracy.iloc[-1] - val_accuracy.iloc[-1]
        rows.append(row | {"jumps": later.diff().abs().mean() / later.median()})
    return pd.DataFrame(rows)


# %% tags=["yours"]
def signs_of(row):
    """The signs of overfitting, unrest and underfitting in a row of `facts`, each with its rule."""
    lowest, rise = f"{row['val_loss_epoch']:.0f}", f"{row['val_loss_rise']:.0%}"
    weak = row["train_accuracy_last"] < WEAK and row["falls"] > 0.5
    found = {
        f"overfitting: the validation loss was lowest in epoch {lowest} and ends {rise} higher "
        f"(rule: more than {RISE:.0%})": row["val_loss_rise"] > RISE,
        f"overfitting: training accuracy ends {row['gap']:.3f} above validation accuracy "
        f"(rule: more than {GAP})": row["gap"] > GAP,
        f"unrest: the validation loss moves by {row['jumps']:.0%} of its median from epoch to "
        f"epoch (rule: more than {JUMPS:.0%})": row["jumps"] > JUMPS,
        f"underfitting: training accuracy ends at {row['train_accuracy_last']:.3f} while the loss "
        f"mostly falls (rule: below {WEAK})": weak,
    }
    return [text for text, there in found.items() if there]


# %% [markdown]
# ## 1 The data
#
# The *COVID-19 Radiography Database* collects images from several sources; only the classes Normal and COVID are read
# here. Two trees are understood: the database itself, of which 15 % become validation and 15 % test, and the
# assignment's `covid_xray` with folders for train, val and test, which are kept. No patient is named, so each image
# counts as one. Looking at test images here is an opening of the test split too: it is logged, with its purpose, and
# nothing below is chosen by it.

# %%
study = open_study(run)
test_opened(study, "exploration: sizes, samples, grey values; no model, no choice")
print(study.dataset.split_rule)
print("training images:", len(study.rows("train")))
sizes = explore.sizes(study.dataset, study.cache.shapes)
files.write_csv(sizes, TABLES / "sizes.csv")
sizes[["split", "class_name", "images", "sizes", "commonest", "share"]].round(2)

# %%
figure = explore.figure_classes(study.dataset, run.caption)
report.save_figure(figure, run, "classes")
figure

# %% [markdown]
# Two images of each class from each split.

# %%
rng = np.random.default_rng(run.seed)
parts = explore.rows_by_split(study.dataset, together=False)
shown = np.concatenate([rng.permutation(rows)[:2] for rows in parts.values()])
titles = study.dataset.manifest.loc[shown, ["split", "class_name"]].agg("\n".join, axis=1)
figure = plots.figure_samples(study.images(shown).cpu().numpy(), titles, run.caption, columns=4)
report.save_figure(figure, run, "samples")
figure

# %% [markdown]
# **Grey values** between 0 (black) and 1 (white). `mean` and `std` are over all pixels of all images (global);
# `contrast` is the mean of the images' own deviations; the last rows are the darkest and brightest place of the mean image
# and the least and most varied place (pixel by pixel).

# %%
grey = explore.pixel_statistics(study.cache, explore.rows_by_split(study.dataset))
files.write_csv(grey, TABLES / "grey.csv")
grey.set_index(["split", "class_name"]).T.round(3)

# %%
figure = explore.figure_mean_images(study.cache, study.dataset, run.caption)
report.save_figure(figure, run, "mean_images")
figure

# %% [markdown]
# **Are the splits alike?** A chi-square test of the class counts, and rank tests of brightness and contrast inside each
# class, corrected for their number (Holm). A split drawn in proportion gives a p near 1 for the counts.

# %%
tests = explore.uniform_split_test(study.dataset, study.cache)
files.write_csv(tests, TABLES / "split_tests.csv")
tests[["test", "class_name", "p_holm", "effect", "meaning"]].round(3)

# %% [markdown]
# **Does an image lie on both sides?** Byte-identical files, and near-duplicates: the same image re-encoded, resized or with
# another brightness (perceptual hash, confirmed by correlation). Such images are kept in one split where the split is
# drawn here; the line "leak" would name those that a published split tore apart.

# %%
audit = split.audit(study.dataset)
files.write_csv(audit, TABLES / "audit.csv")
copies = study.dataset.manifest.groupby("look").size()
print(
    f"{(copies > 1).sum()} groups of images that look the same, {copies[copies > 1].sum()} images "
    "in all"
)
audit


# %% [markdown]
# **Do the classes differ in image quality?** Four numbers that know nothing of lungs, on training images: how well does
# each *alone* tell COVID from normal? An AUC of 0.5 is no help; above it COVID images have more of it, below it less.
# Whatever lies far from 0.5 is a shortcut that a network may take. So may be the size of the files (first table, of all
# images).

# %%
def quality(images):
    """Brightness, contrast, sharpness and share of black pixels of images [N,1,S,S]."""
    soft = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    measured = {
        "mean grey": images.mean((1, 2, 3)),
        "contrast": images.std((1, 2, 3)),
        "sharpness": (images - soft).std((1, 2, 3)),
        "black pixels": (images == 0).float().mean((1, 2, 3)),
    }
    return pd.DataFrame({name: values.numpy() for name, values in measured.items()})


rows = study.rows("train")
labels = study.labels(rows).cpu().numpy()
measured = quality(study.images(rows).cpu())
table = []
asked = (
    {"": 1}
    if len(study.dataset.classes) == 2
    else {f", {c}": k for k, c in enumerate(study.dataset.classes)}
)
for (name, values), (which, label) in itertools.product(measured.items(), asked.items()):
    outcome = metrics.classification(
        labels == label, values, study.patients(rows), draws=run.bootstrap_draws
    )
    medians = {
        f"median, {c}": values[labels == k].median() for k, c in enumerate(study.dataset.classes)
    }
    table.append(
        {"measure": name + which} | medians | outcome[outcome.metric.eq("auc")].iloc[0].to_dict()
    )
table = pd.DataFrame(table).drop(columns="metric")
files.write_csv(table, TABLES / "quality.csv")
formats = explore.size_shortcut(study.dataset, study.cache.shapes, draws=run.bootstrap_draws)
files.write_csv(formats, TABLES / "formats.csv")
display(formats.round(3))
table.round(3)


# %% [markdown]
# ## 2 From image to input
#
# Images are decoded once to grey squares. Two decisions follow. What they cost or gain is measured by short trainings
# of the same network on training images, scored on **validation** images:
#
# - **Normalisation**: fixed values $(x - 0.5)/0.25$; each image by its own mean and deviation (*sample*); one mean
#   and one deviation of the training images (*training*); or a mean and a deviation for each place (*each pixel*).
# - **Resolution**: the size of this profile against a half and a quarter of it.
#
# First, what each normalisation makes of a few validation images.

# %%
def normalisations(study):
    """Four ways to normalise images [N,1,S,S] in [0,1], by statistics of the training images."""
    mean, spread = explore.mean_and_spread(study.cache, study.rows("train"))
    overall = float(mean.mean()), float(np.sqrt((spread**2 + mean**2).mean() - mean.mean() ** 2))
    place = torch.from_numpy(mean).float(), torch.from_numpy(spread).float()
    least = 1 / 255  # a flat image or a border that is black in every image has no deviation

    def sample(x):
        deviation = x.std((1, 2, 3), keepdim=True, correction=0)
        return (x - x.mean((1, 2, 3), keepdim=True)) / deviation.clamp(min=least)

    return {
        "fixed": lambda x: (x - 0.5) / 0.25,
        "sample": sample,
        "training": lambda x: (x - overall[0]) / max(overall[1], least),
        "training, each pixel": lambda x: (x - place[0].to(x)) / place[1].to(x).clamp(min=least),
    }


study = open_study(run)
strategies = normalisations(study)
sample = study.images(study.rows("val")[:16])
made = {name: normalise(sample) for name, normalise in strategies.items()}
pd.DataFrame(
    [
        {
            "normalisation": name,
            "mean": x.mean().item(),
            "deviation": x.std().item(),
            "lowest": x.min().item(),
            "highest": x.max().item(),
        }
        for name, x in made.items()
    ]
).round(2)


# %%
def quick_training(study, name, prepare, *, shrink=1):
    """Validation AUC and seconds an epoch of a short training on images that `prepare` made
    ready."""
    chosen = np.random.default_rng(run.seed).permutation(study.rows("train"))[: run.quick_images]
    ready = [
        TensorDataset(
            F.avg_pool2d(prepare(study.images(rows)), shrink).cpu(), study.labels(rows).cpu()
        )
        for rows in (chosen, study.rows("val"))
    ]
    model = models.cnn(
        num_classes=len(study.dataset.classes),
        channels=channels(run.width),
        hidden=run.hidden,
        dropout=run.dropout,
        mean=0.0,
        std=1.0,
        seed=run.seed,
    )
    loss = cross_entropy(weight=study.class_weights())
    fitted = fit_model(
        study,
        f"quick/{name}",
        model,
        loss,
        *ready,
        epochs=run.quick_epochs,
        patience=None,
        monitor="epoch",
        num_workers=0,
        progress=False,
    )
    probability, labels, _ = predict(model, ready[1])
    patients = study.patients(study.rows("val"))
    outcome = metrics.classification(
        labels, score_of(probability), patients, draws=run.bootstrap_draws
    )
    return outcome[outcome.metric.eq("auc")].iloc[0].to_dict() | {
        "seconds": fitted.history["seconds"].median()
    }


quick = []
for name, normalise in strategies.items():
    found = quick_training(study, name.replace(", ", "_").replace(" ", "_"), normalise)
    quick.append({"compared": "normalisation", "name": name, "size": run.size} | found)
for shrink in (1, 2, 4):
    size = run.size // shrink
    name = (
        "training" if shrink == 1 else f"size_{size}"
    )  # at full size it is the training from above
    found = quick_training(study, name, strategies["training"], shrink=shrink)
    quick.append({"compared": "resolution", "name": f"{size} px", "size": size} | found)
quick = pd.DataFrame(quick).drop(columns="metric")
files.write_csv(quick, TABLES / "quick.csv")
quick.round(3)

# %% [markdown]
# The rest of the notebook uses the statistics of the **training** images, one pair of numbers for all places. They are
# stored inside the model, so that no image can reach it normalised twice or not at all. That was decided beforehand,
# because it needs nothing but training images and changes no image's exposure; the table shows what it costs, if
# anything.

# %% [markdown]
# ## 3 Augmentation
#
# Only training images are augmented, anew in every epoch, in the same way for both classes. Each line of the figure
# shows one step alone, always applied and drawn twice; the last line all of them as they are combined.

# %%
study = open_study(run)
names = ("flip", "rotation, shift, zoom", "brightness, contrast", "gamma", "softness")
steps = dict(zip(names, augment.train_transform(flip=1, blur=1).transforms, strict=True))
for step in steps.values():
    step.p = 1  # in training some steps are left out at random
lines = {name: augment.A.Compose([step]) for name, step in steps.items()}
lines["combined"] = augment.A.Compose(list(steps.values()))
image = np.array(study.cache.images[study.rows("train")[0]])
figure, axes = plots.panels(3, rows=len(lines), width=1.8, height=2.0)
for line, (name, transform) in zip(axes, lines.items(), strict=True):
    for draw, axis in enumerate(line):
        if draw:
            transform.set_random_seed(run.seed + draw - 1)
        axis.imshow(transform(image=image)["image"] if draw else image, "gray", vmin=0, vmax=255)
        axis.set_title(name if draw else "original", fontsize=8)
        axis.axis("off")
report.save_figure(figure, run, "augmentation")
figure

# %% [markdown]
# **The pipelines** that all trainings below use: training images augmented, all others as they are. The model then
# normalises.

# %%
given = []
for part, augmented in (("train", True), ("val", False)):
    images, raw = (
        study.torch_set(part, augmented=augmented),
        study.images(study.rows(part)[:32]).cpu(),
    )
    changed = (
        (torch.stack([images[k][0] for k in range(len(raw))]) != raw)
        .flatten(1)
        .any(1)
        .float()
        .mean()
        .item()
    )
    given.append(
        {
            "split": part,
            "images": len(images),
            "augmented": augmented,
            "share of images that changed": changed,
        }
    )
pd.DataFrame(given)

# %% [markdown]
# ## 4 The first network
#
# **How success is measured.** Choices are made by the AUC on validation images: it needs no threshold and does not move
# with the share of the classes. Reported are also sensitivity (share of COVID images found), specificity (share of
# normal images left alone) and accuracy at the threshold 0.5, which is fixed beforehand. The seed in the settings
# decides weights, order of the images, augmentation and dropout.
#
# **Architecture.** Blocks of convolution, batch normalisation, ReLU and 2 x 2 maximum; the last map averaged to
# 4 x 4; a hidden layer, dropout, and the last layer with one logit a class.

# %%
study = open_study(run)
models.summary(network(study, width=run.width, dropout=run.dropout), run.size)


# %% [markdown]
# **The first training**: cross-entropy (both classes weigh the same), Adam, a fixed number of epochs (thirty in the
# full profile), no early stopping. `unaugmented` is the same without augmentation: what the network does when it can
# learn the images by heart.

# %%
def train_first(name):
    study = open_study(run)
    model = network(study, width=run.width, dropout=run.dropout)
    loss = cross_entropy(weight=study.class_weights())
    images = study.torch_set("train", augmented=name == "initial")
    return fit_model(study, name, model, loss, images, study.torch_set("val"), patience=None)


first = launch.each(train_first, ["initial", "unaugmented"], log_dir=run.run_dir / "logs")
histories = {name: fitted.history for name, fitted in first.items()}
figure = plots.figure_curves(histories, run.caption)
report.save_figure(figure, run, "curves_initial")
display(figure)
read = facts(histories)
read.set_index("run").T.round(3)

# %% [markdown]
# The rules that read the curves stand above the first section, so that the sentences can be checked. (Training
# accuracy is measured during training, with dropout and augmentation: it understates what the network knows.)

# %%
for _, row in read.iterrows():
    print(
        f"{row['run']}:",
        "; ".join(signs_of(row)) or "no sign of overfitting, unrest or underfitting",
    )


# %% [markdown]
# ## 5 Search
#
# Four hyper-parameters: learning rate, dropout, batch size, and width (channels of the first block). Each run trains a
# **new** network; its score is the best validation AUC. Three rules are kept by code:
#
# - *TPE* (a Bayesian strategy) draws new values where earlier ones were good, all four at a time;
# - *median pruning* ends a run that is worse than the median of the earlier runs at the same epoch;
# - *boundary extension*: if the best value lies on the edge of its range, the range grows and is searched again.
#
# The number of epochs is not searched: early stopping finds it. Every run is a row of `search/runs.csv`. A search that
# is cut off goes on where it stopped.

# %%
def run_once(params, report_score):
    """Train a new network with these values; its best validation AUC is the score."""
    study = open_study(run)
    model = network(study, width=params["width"], dropout=params["dropout"])
    fitted = fit_model(
        study,
        f"search/{search.run_name(params)}",
        model,
        cross_entropy(weight=study.class_weights()),
        study.torch_set("train", augmented=True),
        study.torch_set("val"),
        lr=params["lr"],
        batch_size=params["batch_size"],
        epochs=run.search_epochs,
        patience=run.search_patience,
        on_epoch=lambda row: report_score(row["epoch"], row["val_auc"]),
        progress=False,
    )
    best = fitted.history.set_index("epoch").loc[fitted.best_epoch]
    return {
        "score": best["val_auc"],
        "val_accuracy": best["val_accuracy"],
        "val_loss": best["val_loss"],
        "train_accuracy": best["train_accuracy"],
        "best_epoch": fitted.best_epoch,
    }


def ordered(beyond_below, values, beyond_above):
    return search.Choice(values, beyond=(beyond_below, beyond_above))


# %%
study = open_study(run)
space = {
    "lr": search.Range(*run.search_lr, log=True, hard=(1e-5, 0.1)),
    "dropout": search.Range(*run.search_dropout, hard=(0, 0.9)),
    "batch_size": ordered(*run.search_batch),
    "width": ordered(*run.search_width),
}
uses = (
    "trials",
    "extend",
    "seed",
    "search_epochs",
    "search_patience",
    "search_lr",
    "search_dropout",
    "search_batch",
    "search_width",
    "blocks",
    "hidden",
)
folder = work_folder(run, "search", study.key | run.pick(*uses))
found = search.search(
    run_once,
    space,
    folder=folder,
    trials=run.trials,
    seed=run.seed,
    extend=run.extend,
    resume=bool(run.resume),
    config=study.key,
)
for path in folder.glob("run_*/*.pt"):
    path.unlink()  # the curves of all runs stay, their weights are not needed again
files.write_csv(found.ranges, TABLES / "ranges.csv")
print(len(found.runs), "runs:", found.runs["state"].value_counts().to_dict())
search.top_runs(found.runs).drop(columns=["number", "state", "seconds"]).round(4)

# %% [markdown]
# Where the best value lies in each range, and which ranges grew. An entry under `edge` says that the best value still
# lies on an edge, and why the search ended there.

# %%
display(pd.DataFrame(found.extensions))
found.ranges

# %%
figure = plots.figure_search(found.runs, run.caption)
report.save_figure(figure, run, "search")
figure

# %% [markdown]
# ## 6 Early stopping, optimiser and loss
#
# The best setting of the search is trained longer, up to the full number of epochs, and stopped when the validation AUC
# has not improved for some epochs. Two variants compete with it under the same rule: SGD with momentum (at ten times
# the rate, as it takes smaller steps), and label smoothing, which keeps the network from being too sure. The best by
# validation AUC decides the recipe, and its best epoch the number of epochs of the final training.

# %%
RECIPES = {"adam": ("adam", 1, 0.0), "sgd": ("sgd", 10, 0.0), "smoothed": ("adam", 1, 0.1)}


def train_recipe(name):
    study = open_study(run)
    best = search.top_runs(pd.read_csv(made_by(run, "search/runs.csv", "5 Search")), count=1).iloc[
        0
    ]
    optimizer, factor, smoothing = RECIPES[name]
    recipe = {
        "optimizer": optimizer,
        "lr": factor * best["lr"],
        "batch_size": int(best["batch_size"]),
    }
    shape = {"width": int(best["width"]), "dropout": float(best["dropout"])}
    loss = cross_entropy(weight=study.class_weights(), label_smoothing=smoothing)
    fitted = fit_model(
        study,
        name,
        network(study, **shape),
        loss,
        study.torch_set("train", augmented=True),
        study.torch_set("val"),
        **recipe,
    )
    epochs = search.retrain_epochs(fitted.history, monitor="val_auc")
    return {
        "recipe": name,
        **recipe,
        **shape,
        "label_smoothing": smoothing,
        "trained": len(fitted.history),
        "epochs": epochs,
        "val_auc": fitted.best_score,
    }


tried = list(launch.each(train_recipe, list(RECIPES), log_dir=run.run_dir / "logs").values())
choice = max(tried, key=lambda one: one["val_auc"])  # the first of equals
files.write_json(choice, run.run_dir / "choice.json")
files.write_csv(pd.DataFrame(tried), TABLES / "recipes.csv")
print(f"chosen: {choice['recipe']}, {choice['epochs']} epochs")
pd.DataFrame(tried).round(4)

# %%
section = "6 Early stopping, optimiser and loss"
histories = {name: pd.read_csv(made_by(run, f"{name}/metrics.csv", section)) for name in RECIPES}
figure = plots.figure_curves(histories, run.caption)
report.save_figure(figure, run, "curves_recipes")
figure

# %% [markdown]
# ## 7 The final baseline
#
# A new network with the chosen setting, trained on training **and** validation images together, for the number of epochs
# found above, without early stopping: nothing is left to stop by. The normalisation stays that of the training images.

# %%
study = open_study(run)
choice = json.loads(made_by(run, "choice.json", "6 Early stopping, optimiser and loss").read_text())
rows = np.concatenate([study.rows("train"), study.rows("val")])
images = augment.CachedImages(
    study.cache,
    rows,
    study.labels(rows).cpu().numpy(),
    transform=augment.train_transform(),
    seed=run.seed,
)
final = network(study, width=choice["width"], dropout=choice["dropout"])
loss = cross_entropy(weight=study.class_weights(), label_smoothing=choice["label_smoothing"])
fitted = fit_model(
    study,
    "baseline",
    final,
    loss,
    images,
    None,
    monitor="epoch",
    patience=None,
    epochs=choice["epochs"],
    optimizer=choice["optimizer"],
    lr=choice["lr"],
    batch_size=choice["batch_size"],
)
chosen = pd.read_csv(run.run_dir / choice["recipe"] / "metrics.csv").head(choice["epochs"])
histories = {"final baseline": fitted.history, f"{choice['recipe']}, on training images": chosen}
figure = plots.figure_curves(histories, run.caption)
report.save_figure(figure, run, "curves_final")
display(figure)
facts(histories)[
    ["run", "epochs", "train_loss_first", "train_loss_last", "train_accuracy_last"]
].round(3)

# %% [markdown]
# **Saved and loaded back.** The file must hold the very same weights, and they must give the very same answers.

# %%
loaded = load_models(study, ["baseline"])["baseline"].to(
    memory_format=torch.channels_last
)  # as in training
x = study.images(study.rows("train")[:64])
answers = [predict(model, x)[0] for model in (final, loaded)]
print("weights bit-equal:", fingerprint(final) == fingerprint(loaded))
print("predictions bit-equal:", np.array_equal(*answers))

# %% [markdown]
# ## 8 The test, once
#
# Every choice has been made. The test split is opened for the final baseline now, and the log keeps it; its predictions
# are stored and read back when this cell runs again. A second opening, say after another training, is refused, unless
# `predictions(..., force=True)` says so in the log.

# %%
study = open_study(run)
choice = json.loads(made_by(run, "choice.json", "6 Early stopping, optimiser and loss").read_text())
told = predictions(study, "baseline")
labels, score = told["label"].to_numpy(), scores(told)
predicted = (score > 0.5).astype(int) if score.ndim == 1 else score.argmax(axis=1)
patients = study.patients(told["image"].to_numpy())
outcome = metrics.classification(labels, score, patients, draws=run.bootstrap_draws)
results = report.result_rows(outcome.assign(epochs=choice["epochs"]), run, model="baseline")
report.update_results(results, RESULTS)
answers = (
    {"baseline": score}
    if score.ndim == 1
    else {f"baseline, {c}": score[:, k] for k, c in enumerate(study.dataset.classes)}
)
files.write_csv(told[["path", "label"]].assign(**answers), run.run_dir / "predictions.csv")
display(pd.read_csv(run.run_dir / "test_log.csv")[["time", "purpose", "split"]])
report.interval_table(outcome)

# %% [markdown]
# The intervals resample images (patients, where they are known). A test result far from the validation result would
# point at a fault in the pipeline: the next line compares them.

# %%
auc = outcome[outcome.metric.eq("auc")].iloc[0]
inside = auc["ci_low"] <= choice["val_auc"] <= auc["ci_high"]
print(
    f"validation AUC when it was chosen {choice['val_auc']:.3f}, test AUC "
    f"{report.with_interval(auc)}: "
    f"{'inside' if inside else 'OUTSIDE'} the interval of the test"
)
figure = plots.figure_confusion(labels, {"baseline": predicted}, study.dataset.classes, run.caption)
report.save_figure(figure, run, "confusion")
display(figure)
figure = plots.figure_roc(labels, {"baseline": score}, run.caption)
report.save_figure(figure, run, "roc")
figure

# %% [markdown]
# Test images as they are, before normalisation, with the network's answer: up to six errors, then images that it got
# right.

# %%
wrong = predicted != labels
order = np.random.default_rng(run.seed).permutation(len(labels))
shown = np.concatenate([order[wrong[order]][:6], order[~wrong[order]][:12]])[:12]
classes = study.dataset.classes
sure = (
    [f"p({classes[1]}) = {p:.3f}" for p in score]
    if score.ndim == 1
    else [f"called {classes[k]}" for k in predicted]
)
titles = [f"{'WRONG: ' if wrong[k] else ''}{classes[labels[k]]}\n{sure[k]}" for k in shown]
figure = plots.figure_samples(
    study.images(told["image"].to_numpy()[shown]).cpu().numpy(), titles, run.caption
)
report.save_figure(figure, run, "test_images")
figure

# %% [markdown]
# ## Questions 1-24
#
# The assignment's questions, in short, and where the evidence stands. The answers below are put together by code from
# this run's tables: another run, another data set, other numbers.
#
# | question | about | evidence |
# |---|---|---|
# | 1 | what makes the data set hard | 1 The data: duplicates, quality, formats |
# | 2 | are the splits uniformly divided | 1 The data: table of tests, audit |
# | 3 | image quality of the two classes | 1 The data: table of measures, mean images |
# | 4 | resolution and downsampling | 2 From image to input: rows "resolution" |
# | 5 | which normalisation | 2 From image to input: rows "normalisation" |
# | 6 | realistic augmentation, generalisation | 3 Augmentation (figure), 4 The first network (curves) |
# | 7 | which metrics | 4 The first network (text), 8 The test, once |
# | 8 | the first curves, what to tune first | 4 The first network (curves), 5 Search (figure) |
# | 9 | overfitting and what was done against it | 4 The first network (curves of `unaugmented`) |
# | 10 | search strategy | 5 Search |
# | 11 | optimiser and loss | 6 Early stopping, optimiser and loss |
# | 12 | curves of the final model | 7 The final baseline |
# | 13 | layers added to a pretrained network | [07](07_covid_transfer_gradcam.ipynb) |
# | 14 | its training curve against the baseline's | [07](07_covid_transfer_gradcam.ipynb) |
# | 15 | fine-tuning and its rate | [07](07_covid_transfer_gradcam.ipynb) |
# | 16 | fine-tuned network against this baseline | [07](07_covid_transfer_gradcam.ipynb) |
# | 17, 18 | transfer learning: for, against, what to change | [07](07_covid_transfer_gradcam.ipynb) |
# | 19, 20 | Grad-CAM with a scalar output, with two classes | [07](07_covid_transfer_gradcam.ipynb) |
# | 21, 22 | do the maps show findings, do they show bias | [07](07_covid_transfer_gradcam.ipynb) |
# | 23, 24 | errors explained, data to collect next | [07](07_covid_transfer_gradcam.ipynb) |

# %%
study = open_study(run)
manifest, classes = study.dataset.manifest, study.dataset.classes
made_in = dict.fromkeys(("quality", "formats", "audit", "split_tests", "sizes"), "1 The data")
made_in |= {
    "quick": "2 From image to input",
    "ranges": "5 Search",
    "recipes": "6 Early stopping, optimiser and loss",
}
table = {
    name: pd.read_csv(made_by(run, f"tables/{name}.csv", section))
    for name, section in made_in.items()
}
quality = table["quality"][(table["quality"].ci_low > 0.5) | (table["quality"].ci_high < 0.5)]
hints = "; ".join(f"{row['measure']} {report.with_interval(row)}" for _, row in quality.iterrows())
formats = table["formats"].set_index("features").loc["all three"]
looks, audit = manifest.groupby("look").size(), table["audit"].set_index("check")["count"]
torn = audit[[check for check in audit.index if check.startswith("near-duplicates in")]].sum()
uneven = table["split_tests"][table["split_tests"]["uneven"]]
found = "; ".join(
    f"{row['test']} ({row['class_name']}), {row['meaning']}" for _, row in uneven.iterrows()
)
answers = {
    1: f"{len(manifest)} images, {manifest['label'].eq(1).mean():.0%} of them {classes[1]}, no "
    "patient named. "
    f"{looks[looks > 1].sum()} images belong to {(looks > 1).sum()} groups that show one image "
    "more "
    "than once"
    + (": a careless split tests on images that it trained on. " if looks.max() > 1 else ". ")
    + f"How far the class can be told without looking at lungs: {len(quality)} of "
    f"{len(table['quality'])} measures of image "
    "quality say something about it (question 3), and the size of the files gives an AUC of "
    f"{report.with_interval(formats)} ({formats['finding']}). A network may learn such a "
    "shortcut instead of the disease; notebook 07 tests for it.",
    2: f"{len(uneven)} of {len(table['split_tests'])} tests found a difference that chance does "
    "not explain"
    + (f": {found}" if found else ": the splits look like random parts of one pool")
    + f". Rule of the split: {study.dataset.split_rule}. Images on two sides, by the audit: "
    f"{torn}.",
    3: (
        f"Yes. AUC of each measure alone on training images (above 0.5: images of {classes[1]} "
        "have "
        "more of it), where the interval "
        f"leaves out 0.5: {hints}. A network can use such differences, and they are no part of "
        "the disease: they may carry "
        "the score here and be missing in a hospital with other machines."
        if hints
        else "None of the four measures tells the classes apart on training images: all intervals "
        "hold 0.5."
    ),
}
Markdown("\n\n".join(f"**Question {number}.** {text}" for number, text in answers.items()))

# %%
quick = {name: part.set_index("name") for name, part in table["quick"].groupby("compared")}
norms, (full, half, quarter) = (
    quick["normalisation"],
    (row for _, row in quick["resolution"].iterrows()),
)
used, best = norms.loc["training"], norms["value"].max()
lost = " and ".join(row.name for row in (half, quarter) if row["value"] < full["ci_low"])
side = table["sizes"]["commonest"].mode()[0]
first = {
    name: pd.read_csv(made_by(run, f"{name}/metrics.csv", "4 The first network"))
    for name in ("initial", "unaugmented")
}
read = facts(first).set_index("run")
early, plain = read.loc["initial"], read.loc["unaugmented"]
answers = {
    4: f"Files of {side} pixels are decoded once to {run.size} x {run.size}. Short trainings gave "
    "an AUC on "
    f"validation images of {report.with_interval(full)} at {full.name}, {half['value']:.3f} at "
    f"{half.name} and "
    f"{quarter['value']:.3f} at {quarter.name}; an epoch at half the side takes "
    f"{half['seconds'] / full['seconds']:.0%} "
    "of the time and a quarter of the memory. "
    + (
        f"Below the interval of the full size, and so too small: {lost}. "
        if lost
        else "Neither falls below the interval "
        "of the full size: the other pixels cost time without a gain that these images can show. "
    )
    + "Cropping to the lungs would use the pixels better; it needs masks and was not tried here.",
    5: "By the training images: one mean and one deviation for all places, kept inside the model. "
    "Short trainings gave "
    f"{'; '.join(f'{name} {report.with_interval(row)}' for name, row in norms.iterrows())}. The "
    "one used lies "
    f"{best - used['value']:.3f} below the best, "
    f"{'inside' if best <= used['ci_high'] else 'OUTSIDE'} its own interval. A "
    "convolution looks for the same pattern everywhere: one pair of numbers for all places leaves "
    "the pattern as it is, "
    "while *each pixel* writes the inverse of the mean image into every image. *Sample* takes the "
    "exposure away, which "
    "helps where machines differ and hides what exposure says.",
    6: "Rotation, shift, zoom, exposure and softness imitate positioning and other machines, "
    "within limits that images "
    "really have (figure in section 3). The flip does not: it puts the heart on the right. "
    "Opacities look alike on both "
    "sides, so it may still help. Best validation AUC with augmentation "
    f"{early['val_auc_best']:.3f}, without "
    f"{plain['val_auc_best']:.3f}; training minus validation accuracy at the end "
    f"{early['gap']:+.3f} and "
    f"{plain['gap']:+.3f}. This run can ensure that no image is on two sides, and that validation "
    "and test images are never "
    "augmented; how it does in another hospital only images from there could show.",
}
Markdown("\n\n".join(f"**Question {number}.** {text}" for number, text in answers.items()))

# %%
runs = pd.read_csv(made_by(run, "search/runs.csv", "5 Search"))
complete = runs[runs["state"].eq("complete")]
moved = (
    complete[["lr", "dropout", "batch_size", "width"]]
    .corrwith(complete["score"], method="spearman")
    .dropna()
)
moved = ", ".join(
    f"{name} {rho:+.2f}" for name, rho in moved.sort_values(key=abs, ascending=False).items()
)
choice = json.loads(made_by(run, "choice.json", "6 Early stopping, optimiser and loss").read_text())
outcome = (
    pd.read_csv(made_by(run, "results.csv", "8 The test, once"))
    .query("model == 'baseline'")
    .set_index("metric")
)
half = (outcome["ci_high"] - outcome["ci_low"]) / 2
majority = manifest.loc[manifest["split"].eq("test"), "label"].value_counts(normalize=True).max()
signs = {name: signs_of(read.loc[name]) for name in read.index}
overfit = {
    name: "; ".join(s for s in told if s.startswith("overfitting")) for name, told in signs.items()
}
remedy = {
    "unrest": "learning rate",
    "overfitting": "dropout and width",
    "underfitting": "learning rate and width",
}
tune = dict.fromkeys(remedy[sign.split(":")[0]] for sign in signs["initial"])
answers = {
    7: "AUC for choosing (it needs no threshold and does not move with the share of the classes), "
    "sensitivity and "
    "specificity for reading (a missed COVID image and a false alarm cost differently), accuracy "
    "for comparing: always "
    f"naming the larger class is right on {majority:.0%} of the test images. "
    + "".join(
        f"{name}: {report.with_interval(outcome.loc[name])}. "
        for name in ("sensitivity", "specificity")
        if name in outcome.index
    )
    + f"{outcome.loc['auc', 'n']:.0f} test images cannot show differences below about "
    f"{half['accuracy']:.2f} in "
    f"accuracy or {half['auc']:.3f} in AUC.",
    8: f"In {early['epochs']:.0f} epochs the training loss went from "
    f"{early['train_loss_first']:.3f} to "
    f"{early['train_loss_last']:.3f} and fell in {early['falls']:.0%} of the steps; validation "
    "AUC was best in epoch "
    f"{early['best_epoch']:.0f} ({early['val_auc_best']:.3f}) and ended at "
    f"{early['val_auc_last']:.3f}. Signs: "
    f"{'; '.join(signs['initial']) or 'none by the rules'}. To tune first, by these: "
    f"{', '.join(tune) or 'nothing in particular; the learning rate, as always'}. What the score "
    "of the search then went "
    f"with (rank correlation over {len(complete)} whole runs): {moved}.",
    9: f"With augmentation: {overfit['initial'] or 'no sign of it by the rules'}. Without: "
    f"{overfit['unaugmented'] or 'no sign of it by the rules'}. Measures: augmentation (gap "
    f"{plain['gap']:+.3f} without "
    f"it, {early['gap']:+.3f} with it), dropout (searched: {choice['dropout']:.2f}), width "
    f"(searched: {choice['width']}), "
    f"batch normalisation, and early stopping (after {choice['epochs']} epochs).",
}
Markdown("\n\n".join(f"**Question {number}.** {text}" for number, text in answers.items()))

# %%
grown, edge = run.run_dir / "search" / "extensions.csv", table["ranges"].dropna(subset=["edge"])
grown = pd.read_csv(grown).iterrows() if grown.exists() else []
grown = "; ".join(f"{row['parameter']} from {row['before']} to {row['after']}" for _, row in grown)
edge = "; ".join(f"{row['parameter']} ({row['edge']})" for _, row in edge.iterrows())
best = ", ".join(
    f"{row['parameter']} {float(row['best']):.3g}" for _, row in table["ranges"].iterrows()
)
states = ", ".join(f"{count} {state}" for state, count in runs["state"].value_counts().items())
recipes = table["recipes"].set_index("recipe")
apart = recipes["val_auc"].max() - recipes["val_auc"].min()
held_out = pd.read_csv(run.run_dir / choice["recipe"] / "metrics.csv")["train_loss"][
    choice["epochs"] - 1
]
final = facts({"final": pd.read_csv(run.run_dir / "baseline" / "metrics.csv")}).iloc[0]
answers = {
    10: "Neither a grid nor one value at a time: TPE draws all four together, each time by the "
    f"scores so far. {len(runs)} "
    f"runs ({states}); a pruned run was below the median of the others at the same epoch. The "
    "ranges were set upfront and "
    f"widened by rule: {grown or 'no best value lay on an edge'}. "
    + (
        f"The best value still lies on an edge for {edge}. "
        if edge
        else "In the end no best value lies on an edge. "
    )
    + f"Best: {best}.",
    11: "Three recipes with the best setting, the same early stopping and the same images. "
    "Validation AUC: "
    + "; ".join(
        f"{name} {row['val_auc']:.4f} (epoch {row['epochs']:.0f})"
        for name, row in recipes.iterrows()
    )
    + f". Chosen, as the highest: *{choice['recipe']}*. With one seed each they lie {apart:.4f} "
    "apart; half the interval "
    f"of the AUC on test images is {half['auc']:.3f}, so this "
    + (
        "may be more than chance."
        if apart > half["auc"]
        else "does not show that any of them is better."
    )
    + " The loss is cross-entropy on two logits, with both classes weighing the same.",
    12: "Without validation images only the training is left to look at: from epoch 1 to "
    f"{final['epochs']:.0f} the loss went from {final['train_loss_first']:.3f} to "
    f"{final['train_loss_last']:.3f}"
    + (f", falling in {final['falls']:.0%} of the steps" if final["epochs"] > 1 else "")
    + f"; the same recipe on training images alone had {held_out:.3f} at that epoch. Training "
    "accuracy ends at "
    f"{final['train_accuracy_last']:.3f}; test accuracy is "
    f"{report.with_interval(outcome.loc['accuracy'])}.",
}
display(Markdown("\n\n".join(f"**Question {number}.** {text}" for number, text in answers.items())))
if run.synthetic:
    display(
        Markdown(
            "*Synthetic images and tiny trainings: these answers show the machinery, not a "
            "finding.*"
        )
    )

# %% [markdown]
# ## Results and files
#
# Each row of `results.csv` says metric, interval, images, seed, size, epochs, profile, data and hardware. All runs of the
# search are in `search/runs.csv`, the openings of the test split in `test_log.csv`.

# %%
results = pd.read_csv(made_by(run, "results.csv", "8 The test, once"))
display(
    results[
        ["model", "metric", "value", "ci_low", "ci_high", "n", "size", "epochs", "profile", "data"]
    ].round(3)
)
written = sorted(
    p.relative_to(run.run_dir).as_posix() for p in run.run_dir.rglob("*") if p.is_file()
)
print(f"{len(written)} files in {run.run_dir.parent.name}/{run.run_dir.name}:")
print(
    "\n".join(
        name
        for name in written
        if "tables/" not in name and "/run_" not in name and "quick/" not in name
    )
)
