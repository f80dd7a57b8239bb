# %% [markdown]
# # 02 FracAtlas: do robust models transfer to fractures, and where do they look?
#
# Eight networks that withstand attacks on tiny colour photographs (CIFAR-10) are fitted with a new last layer and
# asked about broken bones. Do they keep their robustness? And does a robust model look at the fracture, where a
# fragile one looks anywhere? A study that asked this published a table of promising numbers. This notebook repeats
# it without the mistakes that made the table, and adds the comparison it lacked: one MobileNetV2 trained plainly and
# trained against attacks.
#
# **What you get**
#
# | part | question |
# |---|---|
# | 1 Data | What is in *FracAtlas*; what do image sizes and a careless augmentation give away? |
# | 2 Training | MobileNetV2: plain, adversarial (PGD-AT), TRADES; a new head on frozen features, plain and robust |
# | 3 Robust models | The eight CIFAR-10 models: loaded strictly, new head, MeanSparse set up |
# | 4 Clean test | Accuracy, sensitivity, specificity, AUC, with intervals |
# | 5 Attacks | PGD as published and the worst case over all attacks; which way the errors go |
# | 6 Masked gradients | Which "robust" model only hides its gradient? |
# | 7 Maps | Saliency, integrated gradients, DeepLIFT, occlusion, Grad-CAM: do they lie on the fracture? |
# | 8 Verdict | Paired tests and a plain answer |
#
# What came out on the real images stands in [results/README.md](../results/README.md); the outputs stored in this file are from the
# smoke profile on *synthetic* images with tiny networks that learnt from others, and only show what you will
# see.
#
# *For research and teaching. Not a medical device.*

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"  # "smoke" (two minutes), "cpu" (laptop, about two hours), "full" (GPU), "auto"
DATA_DIR = ""  # empty: find the data set; else the folder that holds FracAtlas
RUN_NAME = ""  # empty: profile and kind of data
RESUME = True  # True: go on where a run stopped; False: anew; "force": under other settings
CHANGES = {}  # settings of your own, whatever the profile, such as {"epochs": 5}

# %% [markdown]
# **The settings.** FULL is the whole study; CPU and SMOKE are what is smaller on a laptop and in a first look. To change
# one, whatever the profile, write it into `CHANGES` above: `CHANGES = {"epochs": 5}`. A typo is told, a changed setting
# is starred below, and the run gets a folder of its own, which takes over whatever the change does not touch.

# %% tags=["settings"]
from dlia_utils.attacks import evaluate
from dlia_utils.units import pixel_eps

# The data; fit "pad" keeps the aspect, unusable_share allows for files of which a third and more is
# missing
FULL = {"dataset": "fracatlas", "seed": 0, "size": 224, "fit": "pad", "per_class": None}
FULL |= {"unusable_share": 0.01, "val_share": 0.1, "test_share": 0.1}
# MobileNetV2, and the recipe of every training; balance "weights" of the classes in the loss, or
# "sampling"
FULL |= {"width": 1.0, "stages": 7, "pretrained": True, "epochs": 30, "batch_size": 32, "lr": 1e-3}
FULL |= {"schedule": "onecycle", "patience": None, "max_minutes": 90.0, "num_workers": 2}
FULL |= {"balance": "weights"}
# Adversarial training, and the head ("linear", or "mlp", the original study's)
FULL |= {"at_eps": 4 / 255, "at_steps": 7, "at_step_size": 1 / 255, "trades_beta": 6.0}
FULL |= {"head": "linear"}
# Robust models of the literature: weights "public" are downloaded, None is random; they were
# trained on 32 px
ZOO = ("chen2024_wrn_34_20", "gairat_wrn_28_10", "huang2021_wrn_34_r", "hat_wrn_34_10")
ZOO += ("rebuffi2021_wrn_70_16", "standard_wrn_28_10", "meansparse_wrn_94_16", "ra_wrn_70_16")
FULL |= {"zoo": ZOO, "zoo_weights": "public", "zoo_width": 1.0, "zoo_size": 64, "zoo_epochs": 30}
# maps of the first so many
FULL |= {"zoo_alphas": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3), "zoo_maps": None}

# %% tags=["settings"]
# The attacks of the suite: add or leave out; their budgets; the eps at which expensive ones run, if
# not at all
FULL |= {"attacks": evaluate.SUITE, "eps_grid": pixel_eps(0.5, 1, 2, 4, 8), "headline_eps": 4 / 255}
FULL |= {"pgd_steps": 10, "pgd_restarts": 1, "attack_batch": 64}
FULL |= {"budgets": {"square": {"steps": 2000}}}
FULL |= {"expensive": {"square": pixel_eps(4)}, "check_images": 50}
# The maps: of so many test images with a finding
FULL |= {"maps": 72, "occlusion_window": 28, "integrated_steps": 32, "bootstrap_draws": 2000}

# %% tags=["settings"]
EXPENSIVE = dict.fromkeys(("apgd_ce", "apgd_margin", "square"), pixel_eps(4))
SHORT = {name: {"steps": 30} for name in ("apgd_ce", "apgd_margin", "fmn")} | {
    "square": {"steps": 200}
}
CPU = {"size": 160, "epochs": 10, "num_workers": 0, "at_eps": 2 / 255, "at_steps": 2}
CPU |= {"at_step_size": 1.4 / 255}
# the zoo's networks are no work for a laptop
CPU |= {"zoo": (), "occlusion_window": 20, "integrated_steps": 16}
CPU |= {"budgets": SHORT, "expensive": EXPENSIVE, "check_images": 24}

TINY = {"apgd_ce": {"steps": 4}, "apgd_margin": {"steps": 4}, "fmn": {"steps": 5}}
TINY |= {"square": {"steps": 10}}
SMOKE = {"size": 48, "per_class": 80, "val_share": 0.15, "test_share": 0.2, "width": 0.5}
SMOKE |= {"stages": 3}
SMOKE |= {"pretrained": "phantom", "epochs": 12, "batch_size": 16, "lr": 2e-3, "num_workers": 0}
SMOKE |= {"max_minutes": None}
SMOKE |= {"at_eps": 4 / 255, "at_steps": 2, "at_step_size": 2.8 / 255}
SMOKE |= {
    "zoo": ("hat_wrn_34_10", "gairat_wrn_28_10", "huang2021_wrn_34_r", "meansparse_wrn_94_16")
}  # one of each family
SMOKE |= {"zoo_maps": 1, "zoo_weights": "phantom", "zoo_width": 1 / 40, "zoo_size": 32}
SMOKE |= {"zoo_epochs": 6}
SMOKE |= {"zoo_alphas": (0.0, 0.2), "eps_grid": pixel_eps(1, 4), "pgd_steps": 3, "budgets": TINY}
SMOKE |= {"expensive": EXPENSIVE, "check_images": 4, "maps": 6, "occlusion_window": 8}
SMOKE |= {"integrated_steps": 8, "bootstrap_draws": 200}

# %% tags=["start"]
from dlia_utils.run import start

run = start(
    "02_fracatlas_robust_models",
    dict(full=FULL, cpu=CPU, smoke=SMOKE),
    dict(profile=PROFILE, data_dir=DATA_DIR, run_name=RUN_NAME, resume=RESUME, changes=CHANGES),
    trains="2 Training MobileNetV2, three ways",
    allowed={"attacks": evaluate.LINF, "zoo": ZOO, "pretrained": ("phantom",)},
)
print(run)

# %% tags=["imports"]
from functools import cache

import cv2
import numpy as np
import pandas as pd
from IPython.display import Markdown, display
from scipy.special import expit
from sklearn.metrics import classification_report, roc_auc_score

from dlia_utils import files, launch, metrics, models, objectives, plots, report, suite, train
from dlia_utils.attacks import checklist, evaluate
from dlia_utils.attacks.alpha import select_alpha
from dlia_utils.data import datasets, explore, split
from dlia_utils.explain import figures, localisation
from dlia_utils.explain.attribution import explain
from dlia_utils.models import robust
from dlia_utils.study import (
    build_model,
    load_models,
    made_by,
    open_study,
    stored,
    test_opened,
    train_head,
    train_model,
    trained,
    weights_label,
    work_folder,
)
from dlia_utils.suite import choose_under_attack
from dlia_utils.units import eps_text

# %% [markdown]
# **What the sections share.**

# %% tags=["yours"]
MODELS = ["standard", "pgd_at", "trades", "linear_probe", "robust_probe"]
RESULTS = run.run_dir / "results.csv"


def study_of(name):
    """The images as the model `name` takes them: the robust models of the literature have a size
    of their own."""
    study = open_study(run)
    return study if name in MODELS else study.variant(size=run.zoo_size, epochs=run.zoo_epochs)


# %% [markdown]
# ## 1 The data
#
# FracAtlas holds 4,083 images of hands, legs, hips and shoulders, 717 of them with a fracture that radiologists boxed
# and outlined. Its flaws: some JPEG files end too early (they are used if the loss is small, left out by name if a
# quarter of the image is missing), one image contradicts itself (flag "not fractured", but a fracture box), patients
# are not named, and a good many images occur twice. The published split covers only the fractured images, so one split
# is drawn here for *all* models: 80 / 10 / 10, stratified by class and body part, with byte-identical images and
# near-duplicates (perceptual hash, confirmed by correlation) always on one side.

# %%
study = open_study(run)
print(study.dataset.split_rule)
display(datasets.summary(study.dataset))
study.dataset.manifest.groupby("look").size().value_counts().rename("groups").rename_axis(
    "images that look alike"
).to_frame()

# %%
pd.set_option("display.max_colwidth", 100)
split.audit(study.dataset)

# %%
labels = study.labels(study.rows("train")).cpu().numpy()
shown = np.concatenate([study.rows("train")[labels == c][:6] for c in (0, 1)])
titles = study.dataset.manifest.loc[shown, ["class_name", "group"]].agg("\n".join, axis=1)
figure = plots.figure_samples(study.images(shown).cpu().numpy(), titles, run.caption)
report.save_figure(figure, run, "samples")
figure

# %% [markdown]
# **What the size of an image gives away.** Before any network: can the class be told from height and width alone? The
# table cross-validates a small model on nothing but the shape. An AUC above 0.5 is a shortcut that every network
# trained on these images may take, because padding to a square keeps the shape visible.

# %%
explore.size_shortcut(study.dataset, study.cache.shapes, draws=run.bootstrap_draws).round(3)


# %% [markdown]
# **The augmentation that gave the label away.** The published code rotated images of *one class only* (with black
# corners), in training, validation and test alike. The score below is nothing but the number of pixels that an image has
# exactly black in its four corners: with one augmentation for both classes it must be near 0.5, with the published one
# it reads the label. All accuracies of that study, clean and attacked, carry this leak.

# %%
def black_corners(image):
    part = len(image) // 8
    corners = [
        image[:part, :part],
        image[:part, -part:],
        image[-part:, :part],
        image[-part:, -part:],
    ]
    return sum(int((corner == 0).sum()) for corner in corners)


def rotated(image, rng):
    turn = cv2.getRotationMatrix2D((len(image) / 2, len(image) / 2), rng.uniform(-20, 20), 1)
    return cv2.warpAffine(image, turn, image.shape)


rng = np.random.default_rng(run.seed)
rows = rng.permutation(study.rows("train"))[:400]
images, chosen = (
    np.maximum(study.cache.images[rows], 1),
    study.dataset.manifest["label"].to_numpy()[rows],
)
alike = [black_corners(rotated(image, rng)) for image in images]
by_label = [
    black_corners(rotated(image, rng) if label == 1 else image)
    for image, label in zip(images, chosen, strict=True)
]
pd.DataFrame(
    {
        "augmentation": ["the same for both classes", "of one class only, as published"],
        "AUC of counting black corner pixels": [
            roc_auc_score(chosen, s) for s in (alike, by_label)
        ],
    }
).round(3)


# %% [markdown]
# ## 2 Training MobileNetV2, three ways
#
# One network, one recipe (Adam, one-cycle rate, the suite's augmentation, the same for both classes), three losses:
#
# | model | loss |
# |---|---|
# | standard | cross-entropy; the fractures together weigh as much as all other images together |
# | pgd_at | cross-entropy on attacked images (Madry et al., [1706.06083](https://arxiv.org/abs/1706.06083)) |
# | trades | cross-entropy on clean images + $\beta\,\mathrm{KL}(p(x)\,\|\,p(x'))$, $\beta = 6$ (Zhang et al., [1901.08573](https://arxiv.org/abs/1901.08573)) |
#
# The attacked ones choose their epoch by validation accuracy *under attack*, balanced over the classes: with most of
# the images healthy, a model that never sees a fracture would look robust.

# %%
def train_standard(study):
    return train_model(
        study, "standard", objectives.cross_entropy(weight=study.class_weights()), monitor="val_auc"
    )


def train_pgd_at(study):
    loss = objectives.pgd_adversarial(
        eps=run.at_eps, steps=run.at_steps, step_size=run.at_step_size, weight=study.class_weights()
    )
    return train_model(study, "pgd_at", loss, **choose_under_attack(study))


def train_trades(study):
    loss = objectives.trades(
        eps=run.at_eps,
        beta=run.trades_beta,
        steps=run.at_steps,
        step_size=run.at_step_size,
        weight=study.class_weights(),
    )
    return train_model(study, "trades", loss, **choose_under_attack(study))


# %% [markdown]
# **A new head on frozen features.** The original study trained only a head on features learnt elsewhere. Two things
# must be right for that: the frozen part stays in eval mode (else its batch statistics drift to the new images, batch by
# batch), and nobody should expect a robust head to make fragile features robust. `linear_probe` is a plain last layer
# on frozen ImageNet features; `robust_probe` is the same layer trained on attacked images. Choose the original's
# two-layer head with the setting `head = "mlp"`.

# %%
def train_linear_probe(study):
    model = models.with_head(build_model(run), head=run.head, seed=run.seed)
    return train_head(
        study, "linear_probe", model, objectives.cross_entropy(weight=study.class_weights())
    )


def train_robust_probe(study):
    model = models.with_head(build_model(run), head=run.head, seed=run.seed).to(run.device)
    loss = objectives.pgd_adversarial(
        eps=run.at_eps, steps=run.at_steps, step_size=run.at_step_size, weight=study.class_weights()
    )
    epochs = max(1, run.epochs // 3)  # a head alone is learnt soon
    return train_head(
        study,
        "robust_probe",
        model,
        loss,
        augmented=True,
        epochs=epochs,
        **choose_under_attack(study),
    )


# %% [markdown]
# **Train them.** With two GPUs two models train at a time; models already trained are read back.

# %%
study = open_study(run)
print("starting weights:", weights_label(run))
makers = {
    "pgd_at": train_pgd_at,
    "trades": train_trades,
    "standard": train_standard,
    "robust_probe": train_robust_probe,
    "linear_probe": train_linear_probe,
}
fitted = launch.each(lambda name: makers[name](study), list(makers), log_dir=run.run_dir / "logs")
pd.DataFrame(
    [
        {
            "model": name,
            "epochs": len(one.history),
            "best epoch": one.best_epoch,
            "best score": one.best_score,
            "minutes": one.seconds / 60,
        }
        for name, one in fitted.items()
    ]
).round(3)

# %%
histories = {
    name: pd.read_csv(run.run_dir / name / "metrics.csv")
    for name in ("standard", "pgd_at", "trades")
}
figure = plots.figure_history(histories, run.caption)
report.save_figure(figure, run, "training")
figure

# %% [markdown]
# ## 3 Robust models of the literature
#
# The table is what their authors reported on CIFAR-10 (AutoAttack at 8/255). Read the last two columns together:
# MeanSparse replaces features by their mean where they are close to it, and its gradient is zero there. Under an attack
# that goes straight through the operator (BPDA) it falls to 73.10, *below* the 73.71 of the model that it was built on
# (Bartoldson et al. 2024, arXiv 2404.09349).

# %%
registry = robust.names()
columns = [
    "title",
    "parameters",
    "megabytes",
    "clean",
    "robust",
    "adaptive",
    "normalises",
    "licence",
]
registry[columns]

# %% [markdown]
# **How to load them without fooling oneself.** The original study loaded one checkpoint with `strict=False`, matched
# no key at all and fine-tuned a *random* network; and it normalised images for models that want raw pixels or
# normalise by themselves. Here a file must fit key by key (`load_report`), the model takes [0, 1] and owns its
# normalisation, and average pooling replaces the fixed 8 x 8 window, so that any image size works. Downloads need
# internet; a model that cannot be fetched is named and left out.
#
# The backbone is frozen, its features are computed once, and the head learns from them. A MeanSparse model first gets
# the statistics of the *training* images, then the width $\alpha$ of its dead zone on *validation* images, by the worse
# of the exact and the straight-through attack.

# %%
ZOO_USES = (
    "zoo_weights",
    "zoo_width",
    "zoo_epochs",
    "zoo_alphas",
    "head",
    "headline_eps",
    "pgd_steps",
    "seed",
    "batch_size",
    "lr",
    "schedule",
    "patience",
    "balance",
    "attack_batch",
)


def train_robust_model(name):
    study = study_of(name)
    folder = work_folder(run, name, study.key | run.pick(*ZOO_USES))
    if (folder / "checkpoint.txt").exists() and run.resume:
        return (folder / "checkpoint.txt").read_text(encoding="utf-8")
    try:
        body = robust.create(name, width=run.zoo_width, pretrained=run.zoo_weights, seed=run.seed)
    except RuntimeError as error:
        return f"left out: {error}"
    model = models.with_head(body.to(run.device), head=run.head, seed=run.seed)
    rows, val = study.rows("train"), study.rows("val")
    batches = [
        rows[start : start + run.attack_batch] for start in range(0, len(rows), run.attack_batch)
    ]
    sparse = "meansparse" in name
    if sparse:  # the head must learn from features of these images, not of CIFAR-10's statistics
        robust.recompute_statistics(model, map(study.images, batches))
    train_head(study, name, model, objectives.cross_entropy(weight=study.class_weights()))
    if sparse:
        table = select_alpha(
            model,
            map(study.images, batches),
            study.images(val),
            study.labels(val),
            grid=run.zoo_alphas,
            eps=run.headline_eps,
            steps=run.pgd_steps,
            seed=run.seed,
        )
        files.write_csv(table, folder / "alpha.csv")
        models.save(
            model,
            folder / "best.pt",
            meta={"alpha": float(table.loc[table.chosen, "alpha"].item())},
        )
    files.write_text(
        run.zoo_weights or "random", folder / "weights.txt"
    )  # what result rows will say
    files.write_text(str(body.load_report or "random weights"), folder / "checkpoint.txt")
    return (folder / "checkpoint.txt").read_text(encoding="utf-8")


# %%
if not run.zoo:
    print(
        "None in this profile: 5 to 60 billion multiplications an image are no work for a laptop. "
        "On Kaggle, with"
    )
    print(
        "internet and a GPU, PROFILE = 'full' downloads them all; one checkpoint: "
        "robust.create(name, pretrained=FILE)."
    )
else:
    study_of(run.zoo[0])  # decode once, before processes share the images
loaded = launch.each(train_robust_model, list(run.zoo), log_dir=run.run_dir / "logs")
pd.DataFrame(loaded.items(), columns=["model", "checkpoint"])

# %%
for name in trained(open_study(run), run.zoo):
    if (run.run_dir / name / "alpha.csv").exists():
        print(f"{name}: the dead zone, chosen on validation images")
        display(pd.read_csv(run.run_dir / name / "alpha.csv").round(3))

# %% [markdown]
# ## 4 The clean test
#
# The test split is opened here, after every choice has been made. A false negative is a missed fracture: look at
# sensitivity before accuracy, which always answering "not fractured" already brings to the share printed here.

# %%
study = open_study(run)
names = [*MODELS, *trained(study, run.zoo)]
test_opened(study, "clean metrics of all models")
rows = study.rows("test")
labels, patients = study.labels(rows).cpu().numpy(), study.patients(rows)
print(
    f'always answering "not fractured" is right on {1 - labels.mean():.1%} of the {len(labels)} '
    "test images"
)
scores, clean = {}, []
for name in names:
    own = study_of(name)
    model = load_models(own, [name])[name]
    scores[name] = train.log_odds(
        model, own.torch_set("test")
    )  # does not saturate, as a probability would
    outcome = metrics.classification(
        labels, scores[name], patients, threshold=0, draws=run.bootstrap_draws
    )
    clean.append(report.result_rows(outcome, own.run, model=name))
clean = pd.concat(clean)
report.update_results(clean, RESULTS)
table = clean.assign(cell=[report.with_interval(row) for _, row in clean.iterrows()])
table.pivot_table(index="model", columns="metric", values="cell", aggfunc="first", sort=False)

# %%
predictions = study.dataset.manifest.loc[rows, ["path", "label"]].assign(
    **{n: expit(s) for n, s in scores.items()}
)
files.write_csv(predictions, run.run_dir / "predictions.csv")
figure = plots.figure_roc(labels, {name: scores[name] for name in names[:7]}, run.caption)
report.save_figure(figure, run, "roc")
figure

# %% [markdown]
# ## 5 Attacks
#
# eps is in pixel units: the number of grey levels (of 255) that any pixel may move. The published study meant PGD at
# 4/255 (10 steps of 1/255, random start), but added it to *normalised* images without rescaling, which made it about
# 1/255. Our `pgd_ce` at 4/255 is the attack it meant. Beside it stands the whole suite: random noise, FGSM, PGD on the
# logit margin, APGD with both losses, the searches for the smallest change (DeepFool, FMN), Square, which sees no
# gradient, and for MeanSparse models the PGD and APGD attacks again straight through the operator. The **worst case**
# counts an image as right only if none of them fooled it at this or a smaller eps. Notebook 01 explains the attacks.

# %%
study = open_study(run)
names = [*MODELS, *trained(study, run.zoo)]
test_opened(study, "the suite of attacks in pixel units")


def attacked(name):
    return suite.attack(study_of(name), name).rows


for name, per_image in launch.each(attacked, names, log_dir=run.run_dir / "logs").items():
    own = study_of(name)
    report.update_results(report.accuracy_rows(per_image, own, model=name), RESULTS)
    directions = report.direction_rows(per_image, own, model=name, eps=run.headline_eps)
    results = report.update_results(directions, RESULTS)
report.results_table(results[results.attack.isin(["clean", "worst"])])

# %% [markdown]
# The table in the form of the published study (clean and PGD accuracy in per cent, eps 4/255), with what it lacked:
# the worst case, and its two directions. *Sensitivity* under attack is the share of fractures still found,
# *specificity* the share of healthy bones still called healthy.

# %%
report.attack_table(results, eps=run.headline_eps)

# %%
figure = plots.figure_accuracy_vs_eps(
    results, run.caption, attack="worst", note="Worst case over all attacks"
)
majority = np.bincount(study.labels(study.rows("test")).cpu()).max() / len(study.rows("test"))
figure.axes[0].axhline(majority, color="0.5", ls="--", lw=1)
report.save_figure(figure, run, "worst_case")
figure

# %% [markdown]
# Confusion matrices of the images attacked with PGD at the headline eps, and scikit-learn's report for the model that
# holds best.

# %%
per_image = {
    name: stored(study_of(name), f"robust_{name}", model=name, section="5 Attacks")
    for name in names
}
answers = {}
for name in MODELS:
    at = per_image[name].attack.eq("pgd_ce") & np.isclose(per_image[name].eps, run.headline_eps)
    own = per_image[name][at].sort_values("image")
    truth = own["label"].to_numpy()
    answers[name] = truth ^ own["fooled"].to_numpy(bool)  # who is fooled names the other class
figure = plots.figure_confusion(truth, answers, study.dataset.classes, run.caption)
report.save_figure(figure, run, "confusion_attacked")
display(figure)
held = {name: (answer == truth).mean() for name, answer in answers.items()}
best = max(held, key=held.get)
print(f"{best}, PGD at {eps_text(run.headline_eps)}")
words = {"target_names": study.dataset.classes, "zero_division": 0}
print(classification_report(truth, answers[best], **words))

# %% [markdown]
# ## 6 Masked gradients
#
# The check list of Carlini et al. ([1902.06705](https://arxiv.org/abs/1902.06705)), as checks that can fail. A WARN is a
# finding about the *evaluation* of that model: do not believe its robust accuracy before you know why.

# %%
study = open_study(run)
names = [*MODELS, *trained(study, run.zoo)]
test_opened(study, "share of zero gradients")
shares, checks = {}, []
for name in names:
    own = study_of(name)
    model, rows = load_models(own, [name])[name], own.rows("test")
    table = stored(
        own,
        f"zero_gradients_{name}",
        lambda m=model, o=own, r=rows: pd.DataFrame(
            {
                "share": [
                    evaluate.zero_gradient_share(
                        m, o.images(r), o.labels(r), batch_size=run.attack_batch
                    )
                ]
            }
        ),
        model=name,
        uses=["attack_batch"],
    )
    shares[name] = table["share"].item()
    checks.append(stored(own, f"checks_{name}", model=name, section="5 Attacks").assign(model=name))
results = report.update_results(report.zero_gradient_rows(shares, study), RESULTS)
checks = pd.concat(checks)
warned = checks.loc[checks["verdict"].eq("WARN"), ["model", "check", "value"]]
print(f"{len(checks) - len(warned)} of {len(checks)} checks passed")
with pd.option_context("display.max_colwidth", 300):
    display(warned.reset_index(drop=True))

# %%
masking = report.masking_table(results, eps=run.headline_eps)
masking.round(3)


# %% [markdown]
# ## 7 Where do they look?
#
# Five kinds of map, all for the class *Fractured*, all on fractured images of the **test** split, whole (the published
# study cut each image into four tiles, explained whatever class was predicted, and used training images too):
#
# | map | what it shows |
# |---|---|
# | saliency | size of the gradient of the fracture logit at each pixel |
# | integrated gradients | gradient x change, summed on the way from a black image; sums to the change of the logit |
# | DeepLIFT | the same sum by rules instead of a path; **refused** where captum has no rule for a layer |
# | occlusion | how much the logit drops when a window is covered |
# | Grad-CAM | which places of the last feature map speak for the class |
#
# The completeness error (does the map sum to what it explains?) is printed, because captum's DeepLIFT gives a wrong map
# without a word for ReLU6, SiLU and reused modules. Those are repaired here or refused.

# %%
def explained(study, name, rows):
    """Maps [N,S,S] in [0,1] of every method that works for the model, and what each said about
    itself."""
    model, x = load_models(study, [name])[name], study.images(rows)
    options = {
        "saliency": {},
        "integrated_gradients": {"steps": run.integrated_steps},
        "deeplift": {},
        "occlusion": {"window": max(4, run.occlusion_window * study.run.size // run.size)},
        "gradcam": {"layer": models.last_map_layer(model)},
    }
    maps, notes = {}, []
    for method, extra in options.items():
        try:
            found = explain(method, model, x, 1, **extra)
        except ValueError as error:
            notes.append({"model": name, "map": method, "remark": f"refused: {error}"[:140]})
            continue
        maps[method] = found.heat().cpu().numpy()
        worst = np.nan if found.error is None else found.error.max().item()
        notes.append(
            {
                "model": name,
                "map": method,
                "zero maps": int(found.zero.sum()),
                "completeness error": worst,
            }
        )
    return maps, pd.DataFrame(notes)


def boxed_rows(study, count):
    """Fractured test images that have a box, at most `count`."""
    return np.intersect1d(study.rows("test"), study.dataset.boxes["image"].to_numpy())[:count]


# %%
study = open_study(run)
test_opened(study, "maps of fractured images")
rows = boxed_rows(study, 3)
for name in ("standard", "pgd_at"):
    maps, notes = explained(study, name, rows)
    display(notes.round(4))
    figure = figures.figure_overlays(
        study.images(rows).cpu().numpy(),
        maps,
        captions=[f"{name}: {study.dataset.manifest.path[r][-14:]}" for r in rows],
        caption=run.caption,
        boxes=localisation.regions_of(study.dataset, rows, study.cache),
    )
    report.save_figure(figure, run, f"overlays_{name}")
    display(figure)


# %% [markdown]
# **Scored against the radiologists' marks.** A picture convinces too easily, so every map of every fractured test image
# is scored against the fracture boxes and outlines:
#
# - *coverage gain*: the share of the box that the hottest 5 % of pixels cover, minus the 5 % that any map covers by chance;
# - *pointing*: is the hottest pixel in the box?
# - *energy gain*: the share of the heat in the box, minus the box's share of the image;
# - *AUPRC* of the pixels.
#
# The three reference rows come from no model: random pixels, a bump in the centre, the edges of the image. A method
# that does not beat **all** of them has not found the fracture.

# %%
def map_rows(summary, study, name):
    """Result rows of map scores: the map goes under attack, its score and region under metric."""
    rows = summary.assign(
        attack="map " + summary["map"], metric=summary["score"] + " " + summary["region"]
    )
    return report.result_rows(rows.filter(report.RESULT_COLUMNS).assign(model=name), study.run)


def map_table(summary):
    """Models and maps down, scores with their intervals across."""
    cells = summary.assign(cell=[report.with_interval(row) for _, row in summary.iterrows()])
    return cells.pivot_table(
        index=["model", "map"], columns="score", values="cell", aggfunc="first", sort=False
    )


# %%
study = open_study(run)
looked = ["standard", "pgd_at", "trades", *trained(study, run.zoo[: run.zoo_maps])]
test_opened(study, "maps scored against boxes and outlines")
rows = boxed_rows(study, run.maps)


@cache
def scored(name):
    """Per image and map: the scores against boxes and outlines; and what each method said about
    itself."""
    study, tables = study_of(name), []
    maps, notes = explained(study, name, rows)
    for kind in ("box", "outline"):
        regions = localisation.regions_of(study.dataset, rows, study.cache, kind=kind)
        images = study.images(rows).cpu()
        per_map = localisation.localise(maps, images, regions, groups=study.patients(rows))
        tables.append(per_map.assign(region=kind))
    return pd.concat(tables), notes


scores, differences = [], []
for name in looked:
    own = study_of(name)
    given = {
        "model": name,
        "uses": ["maps", "occlusion_window", "integrated_steps", "seed", "size"],
    }
    per_map = stored(own, f"maps_{name}", lambda n=name: scored(n)[0], **given)
    stored(own, f"remarks_{name}", lambda n=name: scored(n)[1], **given)
    for kind, part in per_map.groupby("region"):
        summary = localisation.summarise(part, draws=run.bootstrap_draws).assign(
            region=kind, model=name
        )
        report.update_results(map_rows(summary, own, name), RESULTS)
        paired = localisation.against_references(part, draws=run.bootstrap_draws)
        scores.append(summary)
        differences.append(paired.assign(region=kind, model=name))
scores, differences = pd.concat(scores), pd.concat(differences)
files.write_csv(differences, run.run_dir / "map_differences.csv")
map_table(scores[scores.region.eq("box")])

# %% [markdown]
# **Do robust models look better?** The published study says so. Method by method, each model's map against the plain
# model's on the *same* images: differences with their intervals. Twenty comparisons a model, not adjusted: one in twenty
# would clear 0 by chance alone.

# %%
study = open_study(run)
per_map = {
    name: stored(study_of(name), f"maps_{name}", model=name, section="7 Where do they look?").query(
        "region == 'box'"
    )
    for name in ["standard", "pgd_at", "trades", *trained(study, run.zoo[: run.zoo_maps])]
}
better = []
for name in list(per_map)[1:]:
    gained = localisation.against_model(
        per_map[name], per_map["standard"], draws=run.bootstrap_draws
    )
    gained = gained.assign(model=name, region="box, minus standard")
    report.update_results(map_rows(gained, study_of(name), name), RESULTS)
    better.append(gained)
map_table(pd.concat(better))

# %%
for name in looked[:3]:
    part = scores[scores.model.eq(name) & scores.region.eq("box")]
    caption = f"{name}; {len(rows)} fractured test images; {run.data_name}; dotted: random pixels"
    figure = figures.figure_forest(part, caption, panel="score", row="map", chance="random")
    report.save_figure(figure, run, f"localisation_{name}")
    display(figure)

# %% [markdown]
# What the methods said about themselves: refusals, maps that are zero everywhere, and the largest completeness error.

# %%
where = "7 Where do they look?"
remarks = pd.concat(
    [stored(study_of(name), f"remarks_{name}", model=name, section=where) for name in looked]
)
remarks.round(4).fillna("")

# %% [markdown]
# **Does the map depend on the model at all?** Layer by layer, from the last one down, the weights are replaced by noise
# (Adebayo et al., [1810.03292](https://arxiv.org/abs/1810.03292)). A map that explains the model must change. The
# dotted line is the likeness of the maps of two *different* images: as unlike as maps of that method get.

# %%
study = open_study(run)
model = load_models(study, ["standard"])["standard"]
x = study.images(boxed_rows(study, 8))
randomised = {}
for method, extra in {
    "saliency": {},
    "gradcam": {"layer": models.last_map_layer(model)},
    "occlusion": {"window": run.occlusion_window},
}.items():
    randomised[method] = stored(
        study,
        f"randomised_{method}_standard",
        lambda m=method, e=extra: localisation.sanity(
            model, x, m, target=1, steps=6, seed=run.seed, **e
        ),
        model="standard",
        uses=["maps", "occlusion_window", "seed"],
    )
figure = figures.figure_randomisation(randomised, run.caption)
report.save_figure(figure, run, "randomised")
figure

# %% [markdown]
# ## 8 Verdict
#
# Every model against the plain one on the *same* images (McNemar's exact test by patient, with Holm's adjustment), clean
# and in the worst case. The sentences are written by code from this run's numbers, so that they cannot claim more than
# the run shows.

# %%
study = open_study(run)
names = [*MODELS, *trained(study, run.zoo)]
per_image = {
    name: stored(study_of(name), f"robust_{name}", model=name, section="5 Attacks")
    for name in names
}
paired = report.paired_tests(per_image, study, eps=run.headline_eps, reference="standard")
files.write_csv(paired, run.run_dir / "paired_tests.csv")
results = pd.read_csv(made_by(run, "results.csv", "5 Attacks"))
masking = report.masking_table(results, eps=run.headline_eps)
display(Markdown(report.verdict(results, masking, paired, run, reference="standard")))

# %% [markdown]
# And the maps: which beat all three references, image by image (the 95 % interval of the difference lies above 0)?

# %%
differences = pd.read_csv(made_by(run, "map_differences.csv", "7 Where do they look?"))
own = differences[differences.region.eq("box") & differences.score.eq("coverage_gain")]
groups = own.groupby(["model", "map"], sort=False)
found = [(key, part) for key, part in groups if (part["ci_low"] > 0).all()]
lost = [", ".join(key) for key, part in groups if (part["ci_high"] < 0).any()]
beaten = ", ".join(dict.fromkeys(own["reference"]))
lines = [f"By *coverage gain*, {len(found)} of {groups.ngroups} maps beat all of {beaten}."]
for (name, shown), part in found:
    hardest = part.loc[part["value"].idxmin()]
    gain = report.with_interval(hardest, signed=True)
    lines.append(
        f"- **{name}, {shown}**: {gain} against the hardest of them, {hardest['reference']}."
    )
if lost:
    lines.append(
        f"- Significantly *worse* than at least one map that knows nothing: {'; '.join(lost)}."
    )
Markdown("\n".join(lines))

# %% [markdown]
# ## Results and files

# %%
results = pd.read_csv(made_by(run, "results.csv", "5 Attacks"))
keep = results.attack.isin(["clean", "worst"]) & (
    results.eps.eq(0) | np.isclose(results.eps, run.headline_eps)
)
display(report.results_table(results[keep]))
written = sorted(
    p.relative_to(run.run_dir).as_posix() for p in run.run_dir.rglob("*") if p.is_file()
)
print(f"{len(written)} files in {run.run_dir.parent.name}/{run.run_dir.name}:")
print("\n".join(name for name in written if not name.startswith(("tables/", "suite/"))))
