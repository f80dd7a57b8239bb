# %% [markdown]
# # 06 How good is a small network from scratch, when it may be tested only once?
#
# A small convolutional network learns to tell chest images with COVID-19 from normal ones. That is easy to do and
# easy to do wrong: an image that lies in training and test alike, a statistic taken over all images, a number of epochs
# chosen on the test split, and the result means nothing. This notebook goes the whole way of a course assignment
# (its tasks 1 and 2), with the rules kept by code: choices read validation images only, near-duplicates stay together,
# and the test split is opened once, after the last choice.
#
# **What you will learn.**
#
# - to explore a data set without looking at its test images, and to find what gives the class away without a lung;
# - to normalise and augment images, and to measure what either decision costs;
# - to read training curves by rules that you can write down;
# - to search four hyper-parameters with TPE (a tree-structured Parzen estimator), pruning and ranges that widen;
# - to choose a number of epochs, train the final model on everything but the test, and say how sure the result is.
#
# **Before you start.** You should read Python with PyTorch (modules, losses, a training loop) and pandas. No other
# notebook is needed; [notebook 07](07_covid_transfer_gradcam.ipynb) goes on with transfer learning, Grad-CAM and the
# question what the networks really read.
#
# **Time.** Smoke on a laptop: about a minute. The cpu profile on a laptop: at most an hour. Full needs a GPU: at
# most 2.5 hours on Kaggle's two T4, by the plan below (not seen yet).
#
# <!-- contents -->
#
# The outputs stored in this file are from the smoke profile on *synthetic* images; they only show what you will see.
# What came out on real images stands in section 9.
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
FULL |= {"val_share": 0.15, "test_share": 0.15, "classes": None, "patient_pattern": ""}
FULL |= {"unusable_share": 0.01}
# The network: width is that of its first block, every further block has twice as many channels
FULL |= {"blocks": 4, "width": 16, "hidden": 128, "dropout": 0.3}
# The recipe; max_minutes is for one training, None is no limit
FULL |= {"epochs": 30, "batch_size": 32, "lr": 1e-3, "patience": 8, "max_minutes": 120.0}
FULL |= {"hours": None}  # of a session; None is 11 of Kaggle's 12, and no limit elsewhere
FULL |= {"num_workers": 2}
# Quick comparisons of sizes and normalisations
FULL |= {"quick_images": 2000, "quick_epochs": 5}
# The search; of batch and width: (values beyond, values, values beyond)
FULL |= {"trials": 30, "extend": 3, "search_epochs": 15, "search_patience": 5}
FULL |= {"search_lr": (3e-4, 1e-2), "search_dropout": (0.1, 0.6)}
FULL |= {"search_batch": ((8,), (16, 32, 64), (128,)), "search_width": ((4,), (8, 16, 32), (64,))}
# Intervals: how often the images are drawn again
FULL |= {"bootstrap_draws": 2000}

# %% tags=["settings"]
CPU = {"size": 96, "epochs": 15, "patience": 4, "num_workers": 0, "quick_epochs": 3}
CPU |= {"trials": 10, "extend": 2, "search_epochs": 6, "search_patience": 3}
CPU |= {"search_width": ((4,), (8, 16), (32,))}

# The data and the recipe: few images, small, seen often
SMOKE = {"size": 48, "per_class": 90, "blocks": 3, "epochs": 20, "batch_size": 16, "patience": 10}
SMOKE |= {"max_minutes": None, "num_workers": 0, "bootstrap_draws": 200}
# The search
SMOKE |= {"trials": 6, "extend": 1, "search_epochs": 4, "search_patience": 4}
SMOKE |= {"search_lr": (5e-4, 3e-3), "search_dropout": (0.1, 0.5)}
SMOKE |= {"search_batch": ((4,), (8, 16), (32,)), "search_width": ((8,), (16, 24), (32,))}

# %% tags=["start"]
from dlia_utils.run import digest, start

run = start(
    "06_covid_baseline",
    dict(full=FULL, cpu=CPU, smoke=SMOKE),
    dict(profile=PROFILE, data_dir=DATA_DIR, run_name=RUN_NAME, resume=RESUME, changes=CHANGES),
    own_data="any",
    trains="7 The final baseline",
)
print(run)

# %% tags=["imports"]
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from scipy.stats import chi2_contingency, gaussian_kde, kruskal
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dlia_utils import files, launch, metrics, models, plan, plots, report, search
from dlia_utils.data import augment, datasets, explore, split
from dlia_utils.device import fingerprint
from dlia_utils.objectives import cross_entropy
from dlia_utils.study import (
    fit_model,
    load_models,
    made_by,
    open_study,
    predictions,
    scores,
    work_folder,
)
from dlia_utils.train import predict

# %% [markdown]
# **What several sections use**: the network, with the normalisation that it carries, and a few small helpers.

# %% tags=["yours"]
TABLES, RESULTS = run.run_dir / "tables", run.run_dir / "results.csv"


def channels(width):
    """Channels of the blocks: each has twice as many as the one before."""
    return [width * 2**block for block in range(run.blocks)]


def deviation(mean, spread):
    """Deviation of all pixels, from the mean and the deviation of each place."""
    return np.sqrt((spread**2 + mean**2).mean() - mean.mean() ** 2)


def grey_statistics(study):
    """Mean and deviation of all pixels of the TRAINING images."""
    mean, spread = explore.mean_and_spread(study.cache, study.rows("train"))
    return mean.mean(), deviation(mean, spread)


def network(study, *, width, dropout, normalisation=None):
    """A fresh network that normalises by a mean and a deviation (of the training images)."""
    mean, std = normalisation or grey_statistics(study)
    shape = {"channels": channels(width), "hidden": run.hidden, "dropout": dropout}
    classes = len(study.dataset.classes)
    return models.cnn(num_classes=classes, **shape, mean=mean, std=std, seed=run.seed)


# %% tags=["yours"]
def score_of(probability):
    """What the metrics take: the probability of class 1, or of more than two classes all."""
    return probability[:, 1] if probability.shape[1] == 2 else probability


def auc_of(labels, score, patients):
    """The AUC with its interval."""
    found = metrics.classification(labels, score, patients, draws=run.bootstrap_draws)
    return found[found["metric"].eq("auc")].iloc[0].drop("metric").to_dict()


def stretched(x):
    """The grey values of a picture moved to [0, 1], so that it can be shown."""
    return ((x - x.min()) / (x.max() - x.min()).clamp(min=1e-6)).cpu()


# %% [markdown]
# **What is measured of the images**, in section 1 without the test images and in section 8 with them: the sizes and the
# grey values of each split and class, and whether the splits could be one pool that was divided at random.

# %% tags=["yours"]
def rows_by_split(dataset, *, together=False):
    """Row numbers of each (split, class), and if `together` of each (split, "all")."""
    manifest, found = dataset.manifest, {}
    for part in ("train", "val", "test"):
        inside = (manifest["split"] == part).to_numpy()
        parts = {"all": inside} if together else {}
        parts |= {name: inside & (manifest["class_name"] == name) for name in dataset.classes}
        found |= {(part, name): np.flatnonzero(own) for name, own in parts.items() if own.any()}
    return found


# %% tags=["yours"]
def sizes_of(dataset, shapes):
    """Heights and widths of the original files in each split and class, one row each."""
    table, rows = pd.DataFrame(shapes, columns=["height", "width"]), []
    table = table.assign(aspect=table["width"] / table["height"])
    for (part, name), chosen in rows_by_split(dataset).items():
        own = table.iloc[chosen]
        common = own[["height", "width"]].value_counts()
        row = {"split": part, "class_name": name, "images": len(own), "sizes": len(common)}
        row |= {"commonest": "{} x {}".format(*common.index[0])}
        row |= {"share": common.iloc[0] / len(own)}
        spread = own.agg(["min", "median", "max"]).unstack()
        rows.append(row | {f"{side}_{how}": value for (side, how), value in spread.items()})
    return pd.DataFrame(rows)


# %% tags=["yours"]
def statistics_of(cache):
    """Mean, deviation, lowest and highest grey value in [0, 1] of each image."""
    found = (image.astype(float) / 255 for image in cache.images)  # one by one, for the memory
    rows = [(image.mean(), image.std(), image.min(), image.max()) for image in found]
    return pd.DataFrame(rows, columns=["grey", "contrast", "min", "max"])


# %% tags=["yours"]
def grey_values(dataset, cache):
    """Grey values in [0, 1] of the images of each split and class, one row each."""
    own, rows = statistics_of(cache), []
    for (split_name, class_name), chosen in rows_by_split(dataset, together=True).items():
        mean, spread = explore.mean_and_spread(cache, chosen)
        row = {"split": split_name, "class_name": class_name, "images": len(chosen)}
        row |= {"min": own["min"][chosen].min(), "max": own["max"][chosen].max()}
        row |= {"mean": mean.mean(), "std": deviation(mean, spread)}
        row |= {"contrast": own["contrast"][chosen].mean()}
        row |= {"pixel_mean_min": mean.min(), "pixel_mean_max": mean.max()}
        rows.append(row | {"pixel_std_min": spread.min(), "pixel_std_max": spread.max()})
    return pd.DataFrame(rows)


# %% tags=["yours"]
def split_tests(dataset, cache):
    """Chi-square of the class counts, Kruskal-Wallis of grey values inside each class."""
    keys = ["split", "patient", "class_name"]
    table = dataset.manifest[keys].join(statistics_of(cache)[["grey", "contrast"]])
    units = table.groupby(keys).mean().reset_index()  # a patient counts once
    counts = pd.crosstab(units["split"], units["class_name"])
    found = chi2_contingency(counts)
    effect = np.sqrt(found.statistic / (counts.to_numpy().sum() * (min(counts.shape) - 1)))
    rows = [("class counts", "all", found.pvalue, effect)]
    for column, test in {"grey": "mean grey", "contrast": "contrast"}.items():
        for name, own in units.groupby("class_name"):
            parts = [part[column] for _, part in own.groupby("split")]
            alike = len(parts) < 2 or own[column].nunique() < 2
            statistic, p = (0.0, 1.0) if alike else kruskal(*parts)
            rows.append((test, name, p, statistic / max(len(own) - 1, 1)))
    return pd.DataFrame(rows, columns=["test", "class_name", "p", "effect"])


# %% [markdown]
# In words: how often a random division would differ as much, whether that is too seldom for luck after the correction
# for several tests, and how large the effect is (by the limits of Cohen, *Statistical Power Analysis for the Behavioral
# Sciences*, 1988).

# %% tags=["yours"]
def judged(tests):
    """The tests with corrected p-values, and what they mean."""
    tests = tests.assign(p_holm=metrics.holm(tests["p"]))
    tests["uneven"], words = tests["p_holm"] < 0.05, []
    for row in tests.itertuples():
        limits = (0.1, 0.3, 0.5) if row.test == "class counts" else (0.01, 0.06, 0.14)
        size = ("negligible", "small", "medium", "large")[np.searchsorted(limits, row.effect)]
        share = f"{row.p:.1%}" if row.p >= 0.001 else "less than 0.1%"
        verdict = f"uneven, by a {size} effect" if row.uneven else "no sign of an uneven division"
        words.append(f"{share} of random divisions would differ at least this much: {verdict}")
    return tests.assign(meaning=words)


# %% [markdown]
# **Rules for reading training curves**, so that every sentence about one can be checked: what a curve says, and from
# where on that is a sign of overfitting, unrest or underfitting. Move the limits if you disagree.

# %% tags=["yours"]
RISE = 0.1  # of the lowest validation loss: a later loss so much higher is a sign of overfitting
GAP = 0.05  # training accuracy above validation accuracy: another one
JUMPS = 0.25  # mean step of the validation loss from epoch to epoch, as a share of its median
WEAK = 0.8  # a training accuracy below this, while the loss still falls: underfitting


def facts(histories):
    """What the curves of some trainings say, one row each; NaN where there is no validation."""
    columns, rows = "train_loss train_accuracy val_loss val_accuracy val_auc".split(), []
    for name, history in histories.items():
        table = history.set_index("epoch").reindex(columns=columns)
        loss, last = table["val_loss"], table.iloc[-1]
        row = {"run": name, "epochs": len(table), "first loss": table["train_loss"].iloc[0]}
        row |= {"last loss": last.train_loss, "training accuracy": last.train_accuracy}
        row["steps that fall"] = (table["train_loss"].diff().iloc[1:] < 0).mean()
        row["best epoch"] = table["val_auc"].idxmax() if loss.notna().any() else np.nan
        row |= {"best AUC": table["val_auc"].max(), "last AUC": last.val_auc}
        row["rise"] = last.val_loss / loss.min() - 1
        row["gap"] = last.train_accuracy - last.val_accuracy
        later = loss.iloc[len(loss) // 2 :] if len(loss) > 3 else loss
        rows.append(row | {"jumps": later.diff().abs().mean() / later.median()})
    return pd.DataFrame(rows).set_index("run")


# %% tags=["yours"]
def signs(read):
    """The rules, applied to rows of `facts`: a line for each training and sign."""
    rows = []
    for name, row in read.iterrows():
        weak = row["training accuracy"] if row["steps that fall"] > 0.5 else 1.0
        asked = [("overfitting: validation loss rises again by", row["rise"], "above", RISE)]
        asked += [("overfitting: training accuracy ahead by", row["gap"], "above", GAP)]
        asked += [("unrest: validation loss jumps by", row["jumps"], "above", JUMPS)]
        asked += [("underfitting: training accuracy is only", weak, "below", WEAK)]
        for sign, value, side, limit in asked:
            there = value > limit if side == "above" else value < limit
            rule = {"value": value, "rule": f"{side} {limit}", "there": bool(there)}
            rows.append({"run": name, "sign": sign} | rule)
    return pd.DataFrame(rows)


# %% [markdown]
# **What this will cost.** Before hours are spent: each phase with the passes of images that the settings ask for, counted
# from these alone, and the time that they take here, measured on a few random batches and, for the trainings, on images
# read and augmented. *At most* counts an attack as if it fooled nobody, and a training as if it never stopped early. Left
# out are figures of a few images, models of your own, and what the CPU does with maps and tables. A run that has a
# budget (`hours`; on Kaggle 11 of the session's 12) ends between two phases or epochs before it is cut off, and goes on
# in the next session. `python -m dlia_utils plan --nb 06 --profile full --device t4` tells the same of Kaggle's GPUs
# beforehand. The cells that count are folded.

# %% tags=["plan"]
def planned_network(width):
    """What the notebook trains, as wide as that."""
    count = len(study.dataset.classes) or 2
    shape = dict(channels=channels(width), hidden=run.hidden, dropout=run.dropout)
    return lambda: models.cnn(num_classes=count, mean=0.5, std=0.25, **shape)


study, phases = open_study(run), []
sizes = {part: len(study.rows(part)) for part in ("train", "val", "test")}
widest = max(sum(run.search_width, ()))
networks = {"CNN": plan.Network(planned_network(run.width), run.size, run.batch_size)}
networks["widest CNN"] = plan.Network(planned_network(widest), run.size, run.batch_size)
how = dict(objective="cross_entropy", batch=run.batch_size, val=sizes["val"])
few = min(run.quick_images, sizes["train"])
given = ("quick comparisons", "CNN", few, run.quick_epochs)
phases += plan.training(*given, settings="quick_images quick_epochs", **how) * 6
for name in ("initial", "unaugmented"):
    given = ("first network", "CNN", sizes["train"], run.epochs)
    phases += plan.training(*given, job=name, settings="epochs", **how)

# %% tags=["plan"]
runs = run.trials + run.extend * (run.trials // 2)
how |= dict(exact=False)  # patience, pruning, and a width that nobody knows before
given, told = ("search", "widest CNN", sizes["train"]), "trials extend search_epochs search_width"
phases += plan.training(*given, runs * run.search_epochs, settings=told, **how)
for name in ("adam", "sgd", "smoothed"):
    given = ("recipes", "widest CNN", sizes["train"], run.epochs)
    phases += plan.training(*given, job=name, settings="epochs", **how)
given = ("final baseline", "widest CNN", sizes["train"] + sizes["val"], run.epochs)
phases += plan.training(*given, settings="epochs", **how | dict(val=0))
loader = study.torch_set("train", augmented=True)

# %%
prices = plan.measured(networks, run.device, loader)
cost = plan.table(networks, phases, prices, gpus=torch.cuda.device_count() or 1)
print(plan.advice(cost, run.budget))
report.show(cost, digits=3)

# %% [markdown]
# ## 1 The data
#
# The *COVID-19 Radiography Database* (Chowdhury et al., "Can AI Help in Screening Viral and COVID-19 Pneumonia?",
# 2020, [arXiv 2003.13145](https://arxiv.org/abs/2003.13145)) collects images from several sources; only the classes
# Normal and COVID are read here. Two trees are understood: the database itself, of which 15 % become validation and
# 15 % test, and the assignment's `covid_xray` with folders for train, val and test, which are kept. No patient is named,
# so each image counts as one.
#
# **What is looked at.** Training and validation images only. Of the test split this section knows what had to be known
# to draw it: how many images of which class there are, and which images are copies of one another (compared by
# code, so that copies end up on one side). The test images get the same tables in section 8, after the test.

# %%
study = open_study(run)
rows = np.sort(np.concatenate([study.rows("train"), study.rows("val")]))
seen = datasets.take(study.dataset, rows)  # numbered anew, without the test images
pixels = replace(study.cache, images=study.cache.images[rows], shapes=study.cache.shapes[rows])
sizes = sizes_of(seen, pixels.shapes)
columns = ["split", "class_name", "images", "sizes", "commonest", "share"]
report.show(sizes[columns].astype({"sizes": str}), notes=study.dataset.split_rule)

# %%
counts = pd.crosstab(study.dataset.manifest["split"], study.dataset.manifest["class_name"])
counts = counts.loc[["train", "val", "test"], [*study.dataset.classes]]
figure, ((axis,),) = plots.panels(1, width=6.0, height=3.2)
counts.plot.bar(ax=axis, color=[*plots.COLORS], rot=0, xlabel="", ylabel="images")
shares = counts.div(counts.sum(axis=1), axis=0)
for name, bars in zip(counts, axis.containers, strict=True):
    texts = [f"{n}\n{share:.0%}" for n, share in zip(counts[name], shares[name], strict=True)]
    axis.bar_label(bars, texts, fontsize=9)
axis.margins(y=0.2)
axis.legend(fontsize=9, frameon=False)
share = counts.sum() / counts.to_numpy().sum()
plots.titled(figure, f"Most images: {share.idxmax()}, {share.max():.0%} of all", run.caption)
report.save_figure(figure, run, "classes")
figure

# %% [markdown]
# **What to see in it.** The share of each class should be about the same in the three splits, as the division draws
# it so. If one class is much larger, accuracy rewards whoever always names that one.
#
# Now two images of each class from either split.

# %%
rng = np.random.default_rng(run.seed)
parts = rows_by_split(seen)
shown = np.concatenate([rng.permutation(rows)[:2] for rows in parts.values()])
titles = seen.manifest.loc[shown, ["split", "class_name"]].agg("\n".join, axis=1)
figure = plots.figure_samples(pixels.batch(shown).numpy(), titles, run.caption, columns=4)
report.save_figure(figure, run, "samples")
figure

# %% [markdown]
# **What to see in it.** Clouds in the lungs, of course. But look at everything else too: frames, letters, tubes, how
# the chest is placed. What differs between the classes outside the lungs can be learnt just as well.
#
# **Grey values** between 0 (black) and 1 (white). `mean` and `std` are over all pixels of all images (global);
# `contrast` is the mean of the images' own deviations; the last four are the darkest and the brightest place of the mean
# image, and the least and the most varied place (pixel by pixel).

# %%
grey = grey_values(seen, pixels)
names = {"pixel_mean_min": "darkest place", "pixel_mean_max": "brightest place"}
names |= {"pixel_std_min": "least varied", "pixel_std_max": "most varied"}
report.show(grey.rename(columns=names))

# %%
names = [*seen.classes]
maps = [explore.mean_and_spread(pixels, parts["train", name]) for name in names]
widest = max(spread.max() for _, spread in maps)
figure, axes = plots.panels(len(maps) + 1, rows=2, width=2.5, height=2.6)
for name, (mean, spread), (above, below) in zip(names, maps, axes.T, strict=False):
    above.imshow(mean, cmap="gray", vmin=0, vmax=1)
    above.set_title(f"mean, {name}", fontsize=9)
    drawn = below.imshow(spread, cmap="viridis", vmin=0, vmax=widest)
    below.set_title(f"standard deviation, {name}", fontsize=9)
    figure.colorbar(drawn, ax=below, fraction=0.046)

# %%
difference, told = maps[1][0] - maps[0][0], f"{names[1]} - {names[0]}"
reach = np.abs(difference).max()
drawn = axes[0, -1].imshow(difference, cmap="RdBu_r", vmin=-reach, vmax=reach)
axes[0, -1].set_title(told, fontsize=9)
figure.colorbar(drawn, ax=axes[0, -1], fraction=0.046)
for axis in axes.flat:
    axis.axis("off")
plots.titled(
    figure,
    f"{told}: at most {reach:.2f} of the grey scale",
    f"grey values in [0, 1]; {run.caption}",
)
report.save_figure(figure, run, "mean_images")
figure

# %% [markdown]
# **What to see in it.** In the difference of the two means, a blob in the lungs is what one hopes for. A sharp shape in
# a corner or along a border is a mark that one class bears more often: the shortcut that notebook 07 hunts.
#
# **Are the splits alike?** If both are random parts of one pool, class counts and grey values differ by chance only. Two
# tests ask how surprising the difference is: chi-square for the class counts, Kruskal-Wallis (a test of ranks) for
# brightness and contrast inside each class. Several tests find something by luck, so their p-values are corrected for
# their number (Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979). A split drawn in proportion gives
# a p near 1 for the counts. An effect (Cramer's V of the counts, epsilon squared of the ranks) lies between 0 and 1.

# %%
tests = judged(split_tests(seen, pixels))
report.show(tests[["test", "class_name", "p_holm", "effect", "meaning"]].round(2))

# %% [markdown]
# **Does an image lie on both sides?** A copy that was compressed anew, resized or brightened has other bytes, and
# still looks the same. The idea of a *perceptual hash* is a fingerprint of what one sees: shrink the image to 8 x 8, and
# note for each of the 64 places whether it is brighter than the median. Copies agree in nearly all of them.

# %%
rows = study.rows("train")[:1000]
small = F.adaptive_avg_pool2d(study.images(rows).cpu(), 8).flatten(1)  # 64 grey values an image
marks = (small > small.median(1, keepdim=True).values).float()
differ = marks @ (1 - marks).T + (1 - marks) @ marks.T  # in how many places two images differ
differ.fill_diagonal_(64)
closest = rows[list(divmod(int(differ.argmin()), len(rows)))]
titles = [name.split("/")[-1] for name in study.dataset.manifest.loc[closest, "path"]]
note = f"{differ.min():.0f} of 64 places differ\n{run.caption}"
figure = plots.figure_samples(study.images(closest).cpu().numpy(), titles, note, columns=2)
report.save_figure(figure, run, "copies")
figure

# %% [markdown]
# **What to see in it.** The two training images that agree best: two files, and to the eye one image. If one of
# them lay in the test split, the test would ask for something that the network knows by heart.
#
# The library does the same with a finer fingerprint (63 low frequencies), and asks for a high correlation of the
# thumbnails besides: fingerprints alone link strangers, as healthy chests are much alike. Such images were kept in
# one split when the splits were drawn; a `leak` below names those that a published split tore apart.

# %%
audit = split.audit(study.dataset)
files.write_csv(audit, TABLES / "audit.csv")
copies = study.dataset.manifest.groupby("look").size()
counted = f"{(copies > 1).sum()} groups look the same, {copies[copies > 1].sum()} images in all"
report.show(audit.astype({"count": str}), notes=counted)

# %% [markdown]
# **Does a number that knows nothing of lungs tell the classes apart?** The AUC (area under the ROC curve, the receiver
# operating characteristic) answers that, and it is simpler than its name: of all pairs of a COVID and a normal image, in
# what share does the COVID image have the larger score? 0.5 is no help, 1 a perfect order, 0 the reverse one.

# %%
labels = study.labels(study.rows("train")).cpu().numpy()
brightness = study.images(study.rows("train")).mean((1, 2, 3)).cpu().numpy()
larger = brightness[labels == 1][:, None] > brightness[labels == 0]  # every pair of the two classes
print(f"the COVID image is brighter in {larger.mean():.2f} of {larger.size:,} pairs")


# %% [markdown]
# Now four such numbers on training images, each *alone*. Above 0.5 COVID images have more of it, below it less.
# Whatever lies far from 0.5 is a shortcut that a network may take. So may be the size of the files (first table).

# %%
def quality(images):
    """Brightness, contrast, sharpness and share of black pixels of images [N,1,S,S]."""
    soft = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    measured = {"mean grey": images.mean((1, 2, 3)), "contrast": images.std((1, 2, 3))}
    measured["sharpness"] = (images - soft).std((1, 2, 3))
    measured["black pixels"] = (images == 0).float().mean((1, 2, 3))
    return pd.DataFrame({name: values.numpy() for name, values in measured.items()})


# %%
rows, classes = study.rows("train"), study.dataset.classes
labels, patients = study.labels(rows).cpu().numpy(), study.patients(rows)
measured, table = quality(study.images(rows).cpu()), []
for label in range(1 if len(classes) == 2 else 0, len(classes)):  # of more than two, each in turn
    for name, values in measured.items():
        middle = values.groupby(labels).median()
        row = {"measure": name} | {f"median, {c}": middle[k] for k, c in enumerate(classes)}
        row |= {"more of it in": classes[label]} | auc_of(labels == label, values, patients)
        table.append(row)

# %%
table = pd.DataFrame(table)
files.write_csv(table, TABLES / "quality.csv")
formats = explore.size_shortcut(seen, pixels.shapes, draws=run.bootstrap_draws)
files.write_csv(formats, TABLES / "formats.csv")
display(report.show(formats.drop(columns="metric"), notes="AUC of the size of the files"))
report.show(table.rename(columns={"value": "AUC"}), digits=3)


# %% [markdown]
# **What we learnt.** A network learns whatever tells the classes apart, so look first at what does so without lungs: a
# measure whose interval leaves out 0.5 is a warning, not a finding. Copies are found by what they look like, and a
# data set can be explored to the end without opening the test split.

# %% [markdown]
# ## 2 From image to input
#
# Images are decoded once to grey squares. Two decisions follow: how many pixels, and which *normalisation*,
#
# $$x' = \frac{x - m}{s},$$
#
# where the question is whose mean $m$ and whose deviation $s$: fixed values; those of each image (*sample*); one
# pair of numbers from the training images (*training*); or a mean and a deviation for each place (*each pixel*). As
# plain code:

# %%
def normalisations(study):
    """Four ways to normalise images [N,1,S,S] in [0,1], by statistics of the training images."""
    mean, std = grey_statistics(study)
    place = explore.mean_and_spread(study.cache, study.rows("train"))
    means, spreads = (torch.from_numpy(one).float().to(run.device) for one in place)
    least = 1 / 255  # a flat image, or a border that is black in every image, has no deviation
    own = {"dim": (1, 2, 3), "keepdim": True}
    return {
        "fixed": lambda x: (x - 0.5) / 0.25,
        "sample": lambda x: (x - x.mean(**own)) / x.std(correction=0, **own).clamp(min=least),
        "training": lambda x: (x - mean) / max(std, least),
        "training, each pixel": lambda x: (x - means) / spreads.clamp(min=least),
    }


# %%
study = open_study(run)
strategies, columns = normalisations(study), "mean deviation lowest highest".split()
x = study.images(study.rows("val")[:16])
made = {name: normalise(x) for name, normalise in strategies.items()}
told = {n: [v.mean(), v.std(), v.min(), v.max()] for n, v in made.items()}
table = pd.DataFrame.from_dict(told, orient="index", columns=columns).astype(float).round(3) + 0.0
report.show(table.rename_axis("normalisation"), notes="of 16 validation images")

# %%
pictures = {"as it is": x[0]} | {name: one[0] for name, one in made.items()}
pictures = {name: stretched(one).numpy() for name, one in pictures.items()}
figure = plots.figure_samples(np.stack([*pictures.values()]), [*pictures], run.caption, columns=5)
report.save_figure(figure, run, "normalised")
figure


# %% [markdown]
# **What to see in it.** Each picture is stretched from its darkest to its brightest value, as a network that can scale
# and shift would see it: the first four are then the same. Only *each pixel* changes the image: it writes the mean
# chest into it, inverted, as a ghost.
#
# What do the decisions cost or gain? Short trainings of the same network on training images, scored on **validation**
# images, tell: first the four normalisations, then the size of this profile against a half and a quarter of it.

# %%
def ready(study, rows, prepare, shrink):
    """Images of `rows`, prepared and shrunk, with their labels."""
    images = F.avg_pool2d(prepare(study.images(rows)), shrink).cpu()
    return TensorDataset(images, study.labels(rows).cpu())


def quick_training(study, name, prepare, *, shrink=1):
    """Validation AUC and seconds an epoch of a short training on prepared images."""
    rows = np.random.default_rng(run.seed).permutation(study.rows("train"))[: run.quick_images]
    sets = [ready(study, own, prepare, shrink) for own in (rows, study.rows("val"))]
    shape = {"width": run.width, "dropout": run.dropout, "normalisation": (0.0, 1.0)}
    model, loss = network(study, **shape), cross_entropy(weight=study.class_weights())
    options = {"epochs": run.quick_epochs, "patience": None, "monitor": "epoch", "num_workers": 0}
    fitted = fit_model(study, f"quick/{name}", model, loss, *sets, progress=False, **options)
    probability, labels, _ = predict(model, sets[1])
    found = auc_of(labels, score_of(probability), study.patients(study.rows("val")))
    return found | {"seconds": fitted.history["seconds"].median()}


# %%
quick = []
for name, normalise in strategies.items():
    found = quick_training(study, name.replace(", ", "_").replace(" ", "_"), normalise)
    quick.append({"compared": "normalisation", "name": name, "size": run.size} | found)
for shrink in (1, 2, 4):
    size = run.size // shrink
    name = "training" if shrink == 1 else f"size_{size}"  # at full size the one from above
    found = quick_training(study, name, strategies["training"], shrink=shrink)
    quick.append({"compared": "resolution", "name": f"{size} px", "size": size} | found)

# %%
quick = pd.DataFrame(quick)
files.write_csv(quick, TABLES / "quick.csv")
told = [report.with_interval(row) for _, row in quick.iterrows()]
columns = {"compared": quick["compared"], "name": quick["name"], "validation AUC": told}
report.show(pd.DataFrame(columns | {"seconds an epoch": quick["seconds"]}))

# %% [markdown]
# The rest of the notebook uses the statistics of the **training** images, one pair of numbers for all places. They are
# stored inside the model, so that no image can reach it normalised twice or not at all. That was decided beforehand,
# because it needs nothing but training images and changes no image's exposure; the table shows what it costs, if
# anything.

# %% [markdown]
# **What we learnt.** Normalise by training images, once, inside the model. Whether fewer pixels suffice is a question
# for validation images: where the interval of a smaller size holds the score of the larger one, the other pixels
# bought nothing that these images can show.

# %% [markdown]
# ## 3 Augmentation
#
# A training image that is moved, brightened or softened a little is still the same chest, and the network has one more
# example to learn what does not matter. By hand, that is a line of array arithmetic each:

# %%
study = open_study(run)
image = np.array(study.cache.images[study.rows("train")[0]])
by_hand = {"original": image, "flip": image[:, ::-1], "shift": np.roll(image, run.size // 12, 1)}
by_hand["brightness"] = np.clip(1.3 * image, 0, 255)
by_hand["softness"] = 0.5 * image + 0.25 * np.roll(image, 1, 0) + 0.25 * np.roll(image, 1, 1)
shown = np.stack([*by_hand.values()]) / 255
figure = plots.figure_samples(shown, [*by_hand], run.caption, columns=5)
figure

# %% [markdown]
# **What to see in it.** The flip puts the heart on the wrong side, and `np.roll` brings back on the left what it
# pushed out on the right: a pattern that no radiograph has. A careless augmentation teaches such patterns.
#
# The pipeline of the library draws strength and direction anew for every image and epoch, in the same way for both
# classes, and fills borders by reflection. Each column of the next figure shows one step alone, always applied and drawn
# twice below the original; the last column all of them as they are combined.

# %%
names = ("flip", "rotation, shift, zoom", "brightness, contrast", "gamma", "softness")
steps = dict(zip(names, augment.train_transform(flip=1, blur=1).transforms, strict=True))
for step in steps.values():
    step.p = 1  # in training some steps are left out at random
lines = {name: augment.A.Compose([step]) for name, step in steps.items()}
lines["combined"] = augment.A.Compose(list(steps.values()))

# %%
figure, axes = plots.panels(len(lines), rows=3, width=1.7, height=2.0)
for column, (name, transform) in zip(axes.T, lines.items(), strict=True):
    for draw, axis in enumerate(column):
        transform.set_random_seed(run.seed + draw)
        drawn = transform(image=image)["image"] if draw else image
        axis.imshow(drawn, "gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(name if draw else "original", fontsize=9)
        axis.axis("off")
plots.titled(figure, "No step may hide or invent the finding", run.caption)
report.save_figure(figure, run, "augmentation")
figure

# %% [markdown]
# **What to see in it.** In each column the two draws differ, and both could be radiographs of other chests or from other
# machines; only the flip could not.
#
# **The pipelines** that all trainings below use: training images augmented, all others as they are. The model then
# normalises.

# %%
rows = []
for part in ("train", "val"):
    images = study.torch_set(part, augmented=part == "train")
    raw = study.images(study.rows(part)[:32]).cpu()
    given = torch.stack([images[k][0] for k in range(len(raw))])
    changed = (given != raw).flatten(1).any(1).float().mean().item()
    rows.append({"split": part, "images": len(images), "share of images changed": changed})
report.show(pd.DataFrame(rows))

# %% [markdown]
# **What we learnt.** Augmentation belongs to the training images only, is the same for every class, and stays within
# what a radiograph can look like: look at it before you train with it.

# %% [markdown]
# ## 4 The first network
#
# **Architecture.** Blocks of convolution, batch normalisation, ReLU (rectified linear unit, $\max(0, x)$) and 2 x 2
# maximum; the last map averaged to 4 x 4; a hidden layer, dropout, and the last layer with one logit a class. What one
# block does, by hand, with a kernel that asks for vertical edges:

# %%
study = open_study(run)
x = study.images(study.rows("train")[:1]).cpu()
edges = torch.tensor([[[[-1.0, 0.0, 1.0]] * 3]])  # dark on the left, bright on the right
steps = {"image": x, "convolution": F.conv2d(x, edges, padding=1)}
steps["ReLU"] = steps["convolution"].relu()
steps["2 x 2 maximum"] = F.interpolate(F.max_pool2d(steps["ReLU"], 2), x.shape[-2:])
shown = np.stack([stretched(one[0]).numpy() for one in steps.values()])
figure = plots.figure_samples(shown, [*steps], run.caption, columns=4)
figure

# %% [markdown]
# **What to see in it.** The convolution answers where the pattern is (bright) and where its reverse is (dark); ReLU
# keeps the first; the maximum halves the side and remembers that something was there, not where exactly. The network
# has as many such kernels as the block has channels, and learns them.

# %%
report.show(models.summary(network(study, width=run.width, dropout=run.dropout), run.size))


# %% [markdown]
# **How success is measured.** With TP, FN, TN, FP for true and false positives and negatives (positive: COVID),
#
# $$\text{sensitivity} = \frac{TP}{TP + FN}, \qquad \text{specificity} = \frac{TN}{TN + FP}, \qquad
# \text{accuracy} = \frac{TP + TN}{\text{all}}$$
#
# at the threshold 0.5, which is fixed beforehand. Choices are made by the AUC on validation images (section 1): it
# needs no threshold and does not move with the share of the classes. The seed in the settings decides weights, order of
# the images, augmentation and dropout.
#
# **The first training**: cross-entropy (both classes weigh the same), Adam (Kingma & Ba, "Adam: A Method for Stochastic
# Optimization", 2015, [arXiv 1412.6980](https://arxiv.org/abs/1412.6980)), a fixed number of epochs (thirty in the full
# profile), no early stopping. `unaugmented` is the same without augmentation: what the network does when it can
# learn the images by heart.

# %%
def train_first(name):
    study = open_study(run)
    model = network(study, width=run.width, dropout=run.dropout)
    loss = cross_entropy(weight=study.class_weights())
    images = study.torch_set("train", augmented=name == "initial")
    return fit_model(study, name, model, loss, images, study.torch_set("val"), patience=None)


first = launch.each(train_first, ["initial", "unaugmented"], log_dir=run.run_dir / "logs")

# %%
histories = {name: fitted.history for name, fitted in first.items()}
figure = plots.figure_curves(histories, run.caption)
report.save_figure(figure, run, "curves_initial")
figure

# %% [markdown]
# **What to see in it.** Does the training loss fall (it learns), does the validation loss follow (it learns something
# general), where do the two part (from there on it learns by heart)? Compare the two colours: without augmentation the
# training loss falls faster. Training accuracy is measured during training, with dropout and augmentation: it
# understates what the network knows.
#
# The same in numbers, and what the rules at the top say of them.

# %%
read = facts(histories)
columns = ["epochs", "first loss", "last loss", "steps that fall", "best epoch", "best AUC"]
display(report.show(read[[*columns, "last AUC"]]))
report.show(signs(read))

# %% [markdown]
# **What we learnt.** Curves are read by rules that stand written down before, or one sees what one hopes for. Unrest asks
# for a smaller rate, overfitting for augmentation, dropout or fewer channels, underfitting for more of them or for more
# epochs.

# %% [markdown]
# ## 5 Search
#
# Four hyper-parameters: learning rate, dropout, batch size, and width (channels of the first block). A grid of five
# values each would take 625 trainings. A *tree-structured Parzen estimator* (TPE; Bergstra, Bardenet, Bengio & Kégl,
# "Algorithms for Hyper-Parameter Optimization", 2011) learns from the runs so far instead. It splits them into the good
# and the others, estimates where each kind lies, $l(x)$ and $g(x)$, and draws next where $l(x) / g(x)$ is greatest.
# The idea in one dimension, with invented runs:

# %%
rng = np.random.default_rng(0)
rates = rng.uniform(-4, -1.5, 24)  # the logarithm of the learning rate of 24 runs
score = 0.95 - 0.1 * (rates + 2.9) ** 2 + 0.02 * rng.normal(size=24)
good, others = np.split(rates[np.argsort(-score)], [6])  # the best quarter, the rest
grid = np.linspace(-4, -1.5, 200)
likely, unlikely = (gaussian_kde(part)(grid) for part in (good, others))
drawn_next = grid[np.argmax(likely / unlikely)]

# %%
figure, ((axis,),) = plots.panels(1, width=6.4, height=3.0)
axis.plot(grid, likely, color=plots.COLORS[0], label="l: density of the good runs")
axis.plot(grid, unlikely, "--", color=plots.COLORS[1], label="g: density of the others")
axis.plot(good, 0 * good, "o", color=plots.COLORS[0])
axis.plot(others, 0 * others, "x", color=plots.COLORS[1])
axis.axvline(drawn_next, ls=":", color="0.3", label="drawn next: l / g is greatest")
axis.set(xlabel="learning rate (logarithm to base 10)", ylabel="density")
figure.legend(loc="outside right center", fontsize=9, frameon=False)
plots.titled(figure, f"Drawn next: learning rate {10**drawn_next:.1g}", "invented runs")
figure


# %% [markdown]
# **What to see in it.** The next run goes where good runs are dense and others are rare, not simply to the best run so
# far. With few runs the two curves are broad, and the search still explores.
#
# The search below (by Optuna: Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", 2019,
# [arXiv 1907.10902](https://arxiv.org/abs/1907.10902)) draws all four parameters so. Each run trains a **new** network;
# its score is the best validation AUC. Two more rules are kept by code:
#
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
    loss = cross_entropy(weight=study.class_weights())
    sets = study.torch_set("train", augmented=True), study.torch_set("val")
    options = {"lr": params["lr"], "batch_size": params["batch_size"], "progress": False}
    options |= {"epochs": run.search_epochs, "patience": run.search_patience}
    options["on_epoch"] = lambda row: report_score(row["epoch"], row["val_auc"])
    name = f"search/run_{digest(params)}"
    fitted = fit_model(study, name, model, loss, *sets, **options)
    best = fitted.history.set_index("epoch").loc[fitted.best_epoch]
    told = best[["val_accuracy", "val_loss", "train_accuracy"]].to_dict()
    return {"score": best["val_auc"]} | told | {"best_epoch": fitted.best_epoch}


# %%
def ordered(beyond_below, values, beyond_above):
    return search.Choice(values, beyond=(beyond_below, beyond_above))


study = open_study(run)
space = {"lr": search.Range(*run.search_lr, log=True, hard=(1e-5, 0.1))}
space |= {"dropout": search.Range(*run.search_dropout, hard=(0, 0.9))}
space |= {"batch_size": ordered(*run.search_batch), "width": ordered(*run.search_width)}
uses = "trials extend seed search_epochs search_patience search_lr search_dropout".split()
uses += "search_batch search_width blocks hidden".split()
folder = work_folder(run, "search", study.key | run.pick(*uses))

# %%
options = {"trials": run.trials, "extend": run.extend, "seed": run.seed, "config": study.key}
found = search.search(run_once, space, folder=folder, resume=bool(run.resume), **options)
for path in folder.glob("run_*/*.pt"):
    path.unlink()  # the curves of all runs stay, their weights are not needed again
files.write_csv(found.ranges, TABLES / "ranges.csv")
best = search.top_runs(found.runs).drop(columns=["number", "state", "seconds"])
best = best.astype({"extension": str}).assign(lr=best["lr"].map("{:.2g}".format))
states = found.runs["state"].value_counts()
counted = ", ".join(f"{count} {state}" for state, count in states.items())
report.show(best, digits=3, notes=f"{len(found.runs)} runs: {counted}; the best complete ones.")

# %% [markdown]
# Which ranges grew, and where the best value lies in each range. An entry under `edge` says that the best value still
# lies on an edge, and why the search ended there.

# %%
grown = pd.DataFrame(found.extensions).astype(str)
display(report.show(grown, notes=f"{len(grown)} times a range grew"))
ranges = found.ranges.assign(best=[f"{value:.3g}" for value in found.ranges["best"]])
report.show(ranges.astype({"extensions": str}))

# %%
figure = plots.figure_search(found.runs, run.caption)
report.save_figure(figure, run, "search")
figure

# %% [markdown]
# **What to see in it.** One panel a parameter, one point a run, a star for the one that is chosen. Is there a slope,
# a hump, or a cloud (the parameter hardly matters)? Hollow points were pruned, so their score is that of the epoch
# where they ended. Where a colour stands beyond the others, a range was widened. On few validation images several
# runs may order all pairs correctly: then the first of them counts.

# %% [markdown]
# **What we learnt.** A search is as honest as its rules: new networks, scores from validation images, ranges that grow
# where the best value lies on an edge, and a table of *all* runs. Its best score flatters, as the best of many always
# does (exercise 1).

# %% [markdown]
# ## 6 Early stopping, optimiser and loss
#
# The number of epochs is chosen by *early stopping*: train until the validation AUC has not improved for some epochs
# (the *patience*), and go back to the best one. The whole rule, applied to the curve of the first network:

# %%
curve = pd.read_csv(made_by(run, "initial/metrics.csv", "4 The first network"))
best, waited, epoch = -np.inf, 0, 0
for auc in curve["val_auc"]:
    epoch += 1
    best, waited = (auc, 0) if auc > best else (best, waited + 1)
    if waited == run.patience:
        break
print(f"stopped after epoch {epoch} of {len(curve)}, the best was {epoch - waited}")

# %% [markdown]
# The best setting of the search is trained so, up to the full number of epochs. Two variants compete with it under the
# same rule: SGD (stochastic gradient descent) with momentum, at ten times the rate, as it takes smaller steps; and
# *label smoothing* (Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016,
# [arXiv 1512.00567](https://arxiv.org/abs/1512.00567)), which asks for 0.95 instead of 1 and so keeps the network from
# being too sure. The best by validation AUC decides the recipe, and its best epoch the number of epochs of the final
# training. On few validation images many epochs order all pairs correctly; among equals the lower validation loss
# decides.

# %%
RECIPES = {"adam": ("adam", 1, 0.0), "sgd": ("sgd", 10, 0.0), "smoothed": ("adam", 1, 0.1)}


def best_epoch(history):
    """The row of the epoch with the best validation AUC; of equal ones that of the lowest loss."""
    equal = history[history["val_auc"].eq(history["val_auc"].max())]
    return equal.loc[equal["val_loss"].idxmin()]


def train_recipe(name):
    study, (optimizer, factor, smoothing) = open_study(run), RECIPES[name]
    runs = pd.read_csv(made_by(run, "search/runs.csv", "5 Search"))
    found = search.top_runs(runs, count=1).iloc[0]
    recipe = {"optimizer": optimizer, "lr": factor * found["lr"]}
    recipe["batch_size"] = int(found["batch_size"])
    shape = {"width": int(found["width"]), "dropout": float(found["dropout"])}
    loss = cross_entropy(weight=study.class_weights(), label_smoothing=smoothing)
    sets = study.torch_set("train", augmented=True), study.torch_set("val")
    fitted = fit_model(study, name, network(study, **shape), loss, *sets, **recipe)
    best = best_epoch(fitted.history)
    told = {"label_smoothing": smoothing, "trained": len(fitted.history)}
    told |= {"epochs": int(best["epoch"]), "val_auc": best["val_auc"], "val_loss": best["val_loss"]}
    return {"recipe": name, **recipe, **shape, **told}


# %%
tried = list(launch.each(train_recipe, list(RECIPES), log_dir=run.run_dir / "logs").values())
choice = max(tried, key=lambda one: (one["val_auc"], -one["val_loss"]))  # the first of equals
files.write_json(choice, run.run_dir / "choice.json")
files.write_csv(pd.DataFrame(tried), TABLES / "recipes.csv")
chosen = f"Chosen: {choice['recipe']}, {choice['epochs']} epochs."
table = pd.DataFrame(tried)
table["lr"] = table["lr"].map("{:.2g}".format)
report.show(table, digits=3, notes=chosen)

# %%
section = "6 Early stopping, optimiser and loss"
histories = {name: pd.read_csv(made_by(run, f"{name}/metrics.csv", section)) for name in RECIPES}
figure = plots.figure_curves(histories, run.caption)
report.save_figure(figure, run, "curves_recipes")
figure

# %% [markdown]
# **What to see in it.** Compare where each recipe reaches its best AUC, and how steady the validation loss is on
# the way. The *training* loss of label smoothing lies higher by its definition and does not compare with the other two.

# %% [markdown]
# **What we learnt.** The number of epochs is a choice like any other and belongs to the validation images. One run of each
# recipe with one seed shows a large difference between optimisers, not a small one.

# %% [markdown]
# ## 7 The final baseline
#
# A new network with the chosen setting, trained on training **and** validation images together, for the number of epochs
# found above, without early stopping: nothing is left to stop by. More images mean more steps in the same number of
# epochs, which is the usual choice:

# %%
study = open_study(run)
choice = json.loads(made_by(run, "choice.json", "6 Early stopping, optimiser and loss").read_text())
rows = np.concatenate([study.rows("train"), study.rows("val")])
counts = pd.Series({"training": len(study.rows("train")), "training and validation": len(rows)})
steps = -(-counts // choice["batch_size"])  # batches an epoch, the last one may be smaller
table = pd.DataFrame({"images": counts, "epochs": choice["epochs"], "steps an epoch": steps})
report.show(table.assign(steps=steps * choice["epochs"]).rename_axis("learns from"))

# %% [markdown]
# The normalisation stays that of the training images, so that the final network differs from the chosen one in what
# it learns from, and in nothing else.

# %%
labels, transform = study.labels(rows).cpu().numpy(), augment.train_transform()
images = augment.CachedImages(study.cache, rows, labels, transform=transform, seed=run.seed)
final = network(study, width=choice["width"], dropout=choice["dropout"])
loss = cross_entropy(weight=study.class_weights(), label_smoothing=choice["label_smoothing"])
recipe = {name: choice[name] for name in ("epochs", "optimizer", "lr", "batch_size")}
recipe |= {"monitor": "epoch", "patience": None}  # the last epoch is the one to keep
fitted = fit_model(study, "baseline", final, loss, images, None, **recipe)

# %%
chosen = pd.read_csv(run.run_dir / choice["recipe"] / "metrics.csv").head(choice["epochs"])
histories = {"final baseline": fitted.history, f"{choice['recipe']}, on training images": chosen}
figure = plots.figure_curves(histories, run.caption)
report.save_figure(figure, run, "curves_final")
figure

# %% [markdown]
# **What to see in it.** The solid lines of the two should run together: the same recipe on a few more images. Only
# the chosen run has a validation line; the final one has nobody to tell it when it learns by heart.

# %%
columns = ["epochs", "first loss", "last loss", "training accuracy"]
report.show(facts(histories)[columns])

# %% [markdown]
# **Saved and loaded back.** The file must hold the very same weights, and they must give the very same answers.

# %%
loaded = load_models(study, ["baseline"])["baseline"]
loaded = loaded.to(memory_format=torch.channels_last)  # the order in memory that training uses
x = study.images(study.rows("train")[:64])
answers = [predict(model, x)[0] for model in (final, loaded)]
print("weights bit-equal:", fingerprint(final) == fingerprint(loaded))
print("predictions bit-equal:", np.array_equal(*answers))

# %% [markdown]
# **What we learnt.** The final training repeats the chosen one on all images but the test's, with nothing left to choose.
# A model counts from the moment on when its file gives the same answers.

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
log = pd.read_csv(run.run_dir / "test_log.csv")
report.show(log[["time", "purpose", "split"]], notes="Openings of the test split in this run.")

# %% [markdown]
# **How sure is a number?** The *bootstrap* plays the test again with the images at hand: draw as many as there are,
# with repetition, and compute the metric anew; the middle 95 % of many such draws are an interval. By hand, for accuracy:

# %%
rng = np.random.default_rng(run.seed)
right = predicted == labels
again = [right[rng.integers(0, len(right), len(right))].mean() for _ in range(2000)]
low, high = np.quantile(again, [0.025, 0.975])
print(f"accuracy {right.mean():.2f}, drawn again {low:.2f} to {high:.2f}, {len(right)} images")

# %% [markdown]
# The library draws whole patients where they are known (images of one patient are no independent witnesses), and gives
# a metric of exactly 0 or 1, which no redrawing can move, an exact interval. These are percentile intervals; where the
# draws lie lopsided about the value, `metrics.bootstrap(..., bca=True)` moves both ends: BCa, the *bias-corrected and
# accelerated* bootstrap (Efron, "Better Bootstrap Confidence Intervals", 1987).

# %%
outcome = metrics.classification(labels, score, patients, draws=run.bootstrap_draws)
results = report.result_rows(outcome.assign(epochs=choice["epochs"]), run, model="baseline")
report.update_results(results, RESULTS)
names = [f"baseline, {c}" for c in study.dataset.classes] if score.ndim > 1 else ["baseline"]
answers = told[["path", "label"]].assign(**dict(zip(names, np.atleast_2d(score.T), strict=True)))
files.write_csv(answers, run.run_dir / "predictions.csv")
report.show(report.interval_table(outcome))

# %%
figure = plots.figure_confusion(labels, {"baseline": predicted}, study.dataset.classes, run.caption)
report.save_figure(figure, run, "confusion")
figure

# %% [markdown]
# **What to see in it.** Of two classes, the upper right cell counts false alarms, the lower left one missed disease. An
# accuracy hides which of the two a model prefers.

# %%
figure = plots.figure_roc(labels, {"baseline": score}, run.caption)
report.save_figure(figure, run, "roc")
figure

# %% [markdown]
# **What to see in it.** Every threshold is a point of the curve; the AUC is the area below it. On few images the curve
# is a staircase: each step is one image.
#
# Test images as they are, before normalisation, with the network's answer: up to six errors, then images that it got
# right.

# %%
wrong, classes = predicted != labels, study.dataset.classes
order = np.random.default_rng(run.seed).permutation(len(labels))
shown = np.concatenate([order[wrong[order]][:6], order[~wrong[order]][:12]])[:12]
sure = [f"called {classes[k]}" for k in predicted]
sure = [f"p({classes[1]}) = {p:.2f}" for p in score] if score.ndim == 1 else sure
titles = [f"{'WRONG: ' if wrong[k] else ''}{classes[labels[k]]}\n{sure[k]}" for k in shown]
images = study.images(told["image"].to_numpy()[shown]).cpu().numpy()
figure = plots.figure_samples(images, titles, run.caption)
report.save_figure(figure, run, "test_images")
figure

# %% [markdown]
# **What to see in it.** Was the network unsure where it was wrong (a probability near 0.5), or wrong and sure? The
# second kind asks what it saw instead; notebook 07 looks there.
#
# **The test images, explored.** Now that the split is open, the tables of section 1 for all three splits. Had the
# test images differed from the others, this is where one would see it, and nothing above could have been fitted to it.

# %%
sizes = sizes_of(study.dataset, study.cache.shapes)
grey = grey_values(study.dataset, study.cache)
tests = judged(split_tests(study.dataset, study.cache))
for name, table in {"sizes": sizes, "grey": grey, "split_tests": tests}.items():
    files.write_csv(table, TABLES / f"{name}.csv")
columns = ["split", "class_name", "images", "sizes", "commonest", "share"]
display(report.show(sizes[columns].astype({"sizes": str})))
display(report.show(grey.rename(columns=lambda name: name.replace("pixel_", ""))))
report.show(tests[["test", "class_name", "p_holm", "effect", "meaning"]].round(2))

# %% [markdown]
# A test result far from the validation result would point at a fault in the pipeline, or at a choice among so many runs
# that its score flatters. The last line compares them.

# %%
auc = outcome.set_index("metric").loc["auc"]
inside = auc["ci_low"] <= choice["val_auc"] <= auc["ci_high"]
line = f"Validation AUC when it was chosen: {choice['val_auc']:.2f}. Test AUC: "
line += f"{report.with_interval(auc)}. The first lies "
line += f"{'inside' if inside else '**outside**'} the interval of the second."
Markdown(report.finding(run, line))

# %% [markdown]
# **What we learnt.** A test number is worth its interval and its log: how many images, and how often the split was
# opened. To compare two models on the same images takes a paired test, which notebook 07 makes: DeLong's for AUCs
# (exercise 3).

# %% [markdown]
# ## 9 The verdict on real images
#
# A run of the `cpu` profile on 1,000 images with COVID-19 and 1,000 normal ones of the *COVID-19 Radiography Database*:
# 96 px for this notebook's baseline, one seed, 300 test images opened once for each model. Brackets are 95 % intervals.
# The last two lines are those of [notebook 07](07_covid_transfer_gradcam.ipynb) on the same test images. The full
# profile (128 px, all images) was not yet run.
#
# <!-- table 06-covid -->
#
# - **The network from scratch works, and not more than that.** It is right on 87 of 100 images, with an AUC of 0.95.
# - **It misses more than it alarms.** It finds 82 % of the COVID images and leaves 93 % of the normal ones alone; the
#   threshold of 0.5 was fixed beforehand, and another one would trade the first for the second.
# - **Features from everyday photographs do better**: clearly so when they are tuned (0.98; the intervals of the first
#   and the last line do not touch), and probably even as they are (*frozen*, 0.92; here the intervals overlap).
# - **None of it proves that lungs are read.** A simple classifier that sees nothing but the *corners* of these images
#   reaches an AUC of 0.92 [0.89, 0.95] (the audit of notebook 07), not much less than this network on whole images.
#   DeGrave, Janizek & Lee ("AI for radiographic COVID-19 detection selects shortcuts over signal", 2021) found the same
#   in published models.
#
# How does your run compare? A smoke run on synthetic images shows the same steps, and its numbers say nothing about
# these: its images are easier, and its test split holds a tenth as many of them, so that its intervals are three times
# as wide. All rows stand in [results/README.md](../results/README.md).

# %% [markdown]
# **What we learnt.** On real images a small network from scratch is a fair baseline and clearly behind transfer learning,
# and a good AUC alone does not say what was learnt.

# %% [markdown]
# ## 10 Questions 1 to 12
#
# The twelve questions of a course assignment (*Project: Medical Image Classification*, its tasks on exploration and on
# the baseline), each asked in our words, answered in principle, and followed by this run's numbers. The real study's
# numbers stand in section 9. Questions 13 to 24 are in [notebook 07](07_covid_transfer_gradcam.ipynb).

# %%
study = open_study(run)
classes, manifest = study.dataset.classes, study.dataset.manifest
SECTIONS = {"audit": "1 The data", "quality": "1 The data", "formats": "1 The data"}
SECTIONS |= {"quick": "2 From image to input", "ranges": "5 Search"}
SECTIONS["split_tests"] = "8 The test, once"
SECTIONS["recipes"] = "6 Early stopping, optimiser and loss"
table = {n: pd.read_csv(made_by(run, f"tables/{n}.csv", one)) for n, one in SECTIONS.items()}
choice = json.loads(made_by(run, "choice.json", SECTIONS["recipes"]).read_text())
first = {name: f"{name}/metrics.csv" for name in ("initial", "unaugmented")}
first = {name: made_by(run, path, "4 The first network") for name, path in first.items()}
read = facts({name: pd.read_csv(path) for name, path in first.items()})
outcome = pd.read_csv(made_by(run, "results.csv", "8 The test, once")).query("attack == 'clean'")

# %% [markdown]
# ### Question 1
#
# *What makes this data set hard to classify automatically?*
#
# The disease is not the only difference between the classes: they were collected at different places, so exposure,
# format and marks may tell them apart. Copies hide among the images, no patient is named, and a split that ignores
# either tests on what was trained on. Below: the copies, and what the size of a file alone gives away.

# %%
groups = manifest.groupby("look").size()
size = table["formats"].set_index("features").loc["all three"]
told = {"images": len(manifest), f"of class {classes[1]}": manifest["label"].eq(1).sum()}
told |= {"groups of copies": (groups > 1).sum(), "images in them": groups[groups > 1].sum()}
told = {name: f"{count:,}" for name, count in told.items()}
report.show(pd.DataFrame([told | {"AUC of the size of the files": report.with_interval(size)}]))

# %% [markdown]
# ### Question 2
#
# *Judged by pixel statistics and class counts, are training, validation and test images divided evenly?*
#
# Even means: no more different than random parts of one pool. The tests say how surprising each difference is, after
# Holm's correction; the audit says whether an image lies on two sides, which no statistic of grey values would show.

# %%
tests = table["split_tests"][["test", "class_name", "p_holm", "effect", "uneven"]]
display(report.show(tests.round(2)))
torn = table["audit"][table["audit"]["check"].str.startswith("near-duplicates in")]
report.show(torn[["check", "count", "verdict"]].astype(str))

# %% [markdown]
# ### Question 3
#
# *Do COVID and normal images differ in quality, and could exposure or artefacts mislead a model?*
#
# Wherever an AUC's interval leaves out 0.5, the classes differ in something that is no part of the disease. A
# model may use it, score well here, and fail in a hospital with other machines.

# %%
quality = table["quality"]
told = quality.drop(columns=["value", "ci_low", "ci_high", "n"])
told["AUC alone"] = [report.with_interval(row) for _, row in quality.iterrows()]
told["leaves out 0.5"] = (quality["ci_low"] > 0.5) | (quality["ci_high"] < 0.5)
report.show(told, digits=3)

# %% [markdown]
# ### Question 4
#
# *Full resolution costs time and memory, perhaps for nothing. How is that dealt with: does downsampling lose too much, is
# there another way?*
#
# Images are decoded once to the size of the profile, and shorter trainings at a half and a quarter of it show what is
# lost: compare their AUCs with the interval of the full size, and the seconds. Half the side is a quarter of the memory.
# Cropping to the lungs would use the pixels better; it needs masks and was not tried here.

# %%
sizes = table["quick"].query("compared == 'resolution'")
told = pd.DataFrame({"size": sizes["name"], "seconds an epoch": sizes["seconds"]})
told["validation AUC"] = [report.with_interval(row) for _, row in sizes.iterrows()]
told["memory, of the full size"] = (sizes["size"] / sizes["size"].max()) ** 2
report.show(told)

# %% [markdown]
# ### Question 5
#
# *Were images normalised by fixed values, by the data set or each by itself; for all places alike or pixel by pixel; and
# what suits a convolutional network best?*
#
# By one mean and one deviation of the training images, kept inside the model. A convolution looks for the same pattern
# everywhere: one pair of numbers for all places leaves the pattern as it is, while *each pixel* writes the inverse of
# the mean image into every image. *Sample* takes the exposure away, which helps where machines differ and hides what
# exposure says.

# %%
norms = table["quick"].query("compared == 'normalisation'")
told = pd.DataFrame({"normalisation": norms["name"], "used": norms["name"].eq("training")})
told["validation AUC"] = [report.with_interval(row) for _, row in norms.iterrows()]
report.show(told)

# %% [markdown]
# ### Question 6
#
# *Are augmented images still plausible radiographs, or do strong transformations bring in patterns that do not exist?
# How is it made sure that the model generalises?*
#
# Rotation, shift, zoom, exposure and softness imitate positioning and other machines, within limits that images really
# have. The flip does not: it puts the heart on the right; opacities look alike on both sides, so it may still help. A run
# can ensure that no image is on two sides and that validation and test images stay as they are; how the model does in
# another hospital only images from there could show.

# %%
columns = {"best AUC": "best validation AUC", "gap": "training ahead of validation, accuracy"}
report.show(read[[*columns]].rename(columns=columns))

# %% [markdown]
# ### Question 7
#
# *Which metrics suit this task, and why?*
#
# AUC for choosing: it needs no threshold and does not move with the share of the classes. Sensitivity and specificity for
# reading: a missed COVID image and a false alarm cost differently. Accuracy for comparing, beside what one gets by
# always naming the larger class. What n images cannot show is about half the width of an interval.

# %%
share = manifest.loc[manifest["split"].eq("test"), "label"].value_counts(normalize=True).max()
note = f"Always naming the larger class is right on {share:.2f} of the test images."
told = report.interval_table(outcome)
told["half the width"] = ((outcome["ci_high"] - outcome["ci_low"]) / 2).to_numpy()
report.show(told, notes=note)

# %% [markdown]
# ### Question 8
#
# *What do the curves of the first model say, and which hyper-parameters should be tuned first?*
#
# A loss that falls steadily is learning; signs of unrest ask for another learning rate first, overfitting for dropout
# and width, underfitting for rate and width. The second table says what the scores of the search then went with (rank
# correlation over complete runs): far from zero matters, and with few runs only far from zero.

# %%
runs = pd.read_csv(made_by(run, "search/runs.csv", "5 Search")).query("state == 'complete'")
display(report.show(signs(read.loc[["initial"]]).drop(columns="run")))
tuned = runs[["lr", "dropout", "batch_size", "width"]]
moved = tuned.rank().corrwith(runs["score"].rank()).rename("rank correlation with the score")
note = f"{len(runs)} complete runs; empty where a parameter or the score never varied"
report.show(moved.rename_axis("parameter"), notes=note)

# %% [markdown]
# ### Question 9
#
# *Did the first model overfit, and what was done against it?*
#
# Two rules answer the first half, with and without augmentation. Against it: augmentation, dropout and width (both
# searched), batch normalisation, and early stopping.

# %%
told = signs(read)
display(report.show(told[told["sign"].str.startswith("overfitting")]))
report.show(pd.DataFrame([choice])[["dropout", "width", "epochs"]], notes="As chosen.")

# %% [markdown]
# ### Question 10
#
# *Which search strategy was used: all combinations, or one parameter at a time? Were the values set upfront, or chosen by
# earlier results?*
#
# Neither a grid nor one at a time: TPE draws all four together, each time by the scores so far, and a run below the
# median of the others at the same epoch ends early. The ranges were set upfront and widened by rule, where the best
# value lay on an edge.

# %%
ranges = table["ranges"].astype({"extensions": str})
ranges["best"] = [f"{float(value):.3g}" for value in ranges["best"]]
states = pd.read_csv(run.run_dir / "search" / "runs.csv")["state"].value_counts()
note = "Runs: " + ", ".join(f"{count} {state}" for state, count in states.items())
report.show(ranges, notes=note)

# %% [markdown]
# ### Question 11
#
# *Which optimiser and which loss were selected, were others tried, and how were they compared?*
#
# Three recipes with the best setting, the same early stopping and the same images; the highest validation AUC wins. The
# loss is cross-entropy on two logits, with both classes weighing the same. One seed each: a difference smaller than half
# the interval of an AUC (question 7) shows nothing.

# %%
recipes = table["recipes"][["recipe", "optimizer", "lr", "label_smoothing", "epochs"]].copy()
recipes["validation AUC"] = table["recipes"]["val_auc"]
recipes["lr"] = recipes["lr"].map("{:.2g}".format)
report.show(recipes, digits=3, notes=f"Chosen: {choice['recipe']}.")

# %% [markdown]
# ### Question 12
#
# *What do the training curves of the final model say?*
#
# Without validation images only the training is left to look at: it should go the way that the same recipe went on
# training images alone. A large difference would be a fault in the pipeline, and a small one is what more images do.

# %%
final = pd.read_csv(made_by(run, "baseline/metrics.csv", run.trains))
alone = pd.read_csv(run.run_dir / choice["recipe"] / "metrics.csv").head(choice["epochs"])
columns = ["epochs", "first loss", "last loss", "steps that fall", "training accuracy"]
told = facts({"final, all but test images": final, "same recipe, training images": alone})
report.show(told[columns])

# %% [markdown]
# **What we learnt.** A question is answered by a principle and a number with its interval, and some numbers answer that
# these images cannot tell.

# %% [markdown]
# ## Results and files
#
# Each row of `results.csv` says metric, interval, images, seed, size, epochs, profile, data and hardware. All runs of the
# search are in `search/runs.csv`, the openings of the test split in `test_log.csv`.

# %%
results = pd.read_csv(made_by(run, "results.csv", "8 The test, once"))
told = report.interval_table(results).assign(model=results["model"])
columns = ["size", "epochs", "seed", "profile", "data"]
report.show(told.join(results[columns].astype(str)))

# %%
report.written(run)

# %% [markdown]
# ## Takeaways
#
# - Three uses of data never mix: training images fit weights and normalisation, validation images decide everything
#   else, test images answer one question, once.
# - Find copies before you split, and find what tells the classes apart without lungs before you train.
# - Read curves by written rules; let a search draw all parameters together, and widen a range whose edge wins.
# - The best of many validation scores flatters; the test's interval says how much is known.
# - A small network from scratch is a baseline: it says what transfer learning has to beat.

# %% [markdown]
# ## Exercises

# %% [markdown]
# **Exercise 1.** Fifteen models that are equally good, each truly right on 87 % of images, are compared on validation
# images, and the best is chosen. How good does the best one look, on 30, on 300 and on 3,000 images?
#
# <details><summary>Solution</summary>
#
# ```python
# rng, rows = np.random.default_rng(0), []
# for images in (30, 300, 3000):
#     share = rng.binomial(images, 0.87, size=(2000, 15)) / images  # 2,000 searches of 15 models
#     row = {"validation images": images, "one model": share[:, 0].mean()}
#     rows.append(row | {"best of fifteen": share.max(axis=1).mean()})
# report.show(pd.DataFrame(rows), digits=3)
# ```
#
# </details>
#
# The best looks better than it is, the more so the fewer the images, though all fifteen are the same: this is why the
# test split exists, and why it is opened after the choice.

# %% [markdown]
# **Exercise 2.** Of the images that the final network calls COVID with probability 0.9, are nine in ten COVID? The
# *expected calibration error* (ECE; see Guo et al., "On Calibration of Modern Neural Networks", 2017,
# [arXiv 1706.04599](https://arxiv.org/abs/1706.04599)) is the mean gap between probability and share of COVID, over groups
# of images of similar probability. Compute it from the stored predictions.
#
# <details><summary>Solution</summary>
#
# ```python
# told = pd.read_csv(made_by(run, "tables/test_baseline.csv", "8 The test, once"))
# groups = pd.qcut(told["probability"], 5, labels=False, duplicates="drop")
# table = told.groupby(groups)[["probability", "label"]].mean()
# table = table.rename(columns={"label": "share of COVID"})
# table["n"] = groups.value_counts()
# gap = (table["probability"] - table["share of COVID"]).abs()
# print(f"expected calibration error {np.average(gap, weights=table['n']):.2f}")
# report.show(table.rename_axis(None))
# ```
#
# </details>
#
# A share above the probability means that COVID is likelier than the network says, a share below it that it is less so.
# A perfectly calibrated network would not score 0 on so few images either: each group's share is itself a draw.

# %% [markdown]
# **Exercise 3.** Is the first network better than a single number that knows nothing of lungs? Compare its AUC on
# validation images with that of the images' contrast, by DeLong's test (DeLong, DeLong & Clarke-Pearson, "Comparing the
# Areas under Two or More Correlated ROC Curves", 1988): it asks whether two scores order the *same* images differently
# well, and uses that both stumble over the same ones.
#
# <details><summary>Solution</summary>
#
# ```python
# study = open_study(run)
# model = load_models(study, ["initial"])["initial"]
# rows = study.rows("val")
# labels, x = study.labels(rows).cpu().numpy(), study.images(rows)
# contrast = x.std((1, 2, 3)).cpu().numpy()
# found = metrics.delong_test(labels, predict(model, x)[0][:, 1], contrast, study.patients(rows))
# found = {"AUC, network": found["auc_a"], "AUC, contrast": found["auc_b"]} | found
# columns = ["AUC, network", "AUC, contrast", "value", "ci_low", "ci_high", "p"]
# report.show(pd.DataFrame([found])[columns].rename(columns={"value": "difference"}))
# ```
#
# </details>
#
# The interval of the difference says how much the network adds; if it held zero, all that training would have bought
# nothing that these images can show.
