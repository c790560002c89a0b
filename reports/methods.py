"""A paper's Methods text about what was really done: paragraphs that cite, and the references of what they cite.

Sentences name a work by its key, `[@ants]` or `[@mae; @videomae]`. Promise: whatever is cited has its full reference,
and nothing else is listed. A DOI is given only where it is known to be the work's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

MARK = re.compile(r"\[(@[^\]]+)\]")

REFERENCES = {  # key: (how a sentence names it, the reference)
    "aal3": (
        "Rolls et al., 2020",
        "Rolls ET, Huang C-C, Lin C-P, Feng J, Joliot M (2020). Automated anatomical labelling atlas 3. NeuroImage "
        "206:116189. doi:10.1016/j.neuroimage.2019.116189",
    ),
    "adam": (
        "Kingma and Ba, 2015",
        "Kingma DP, Ba J (2015). Adam: a method for stochastic optimization. ICLR. arXiv:1412.6980",
    ),
    "adamw": (
        "Loshchilov and Hutter, 2019",
        "Loshchilov I, Hutter F (2019). Decoupled weight decay regularization. ICLR. arXiv:1711.05101",
    ),
    "adhd200": (
        "ADHD-200 Consortium, 2012",
        "ADHD-200 Consortium (2012). The ADHD-200 Consortium: a model to advance the translational potential of "
        "neuroimaging in clinical neuroscience. Frontiers in Systems Neuroscience 6:62. doi:10.3389/fnsys.2012.00062",
    ),
    "algonauts": (
        "Gifford et al., 2023",
        "Gifford AT, Lahner B, Saba-Sadiya S, et al. (2023). The Algonauts Project 2023 challenge: how the human brain "
        "makes sense of natural scenes. arXiv:2301.03198",
    ),
    "ants": (
        "Avants et al., 2011",
        "Avants BB, Tustison NJ, Song G, Cook PA, Klein A, Gee JC (2011). A reproducible evaluation of ANTs similarity "
        "metric performance in brain image registration. NeuroImage 54:2033-2044. "
        "doi:10.1016/j.neuroimage.2010.09.025",
    ),
    "baker": (
        "Baker and Matthews, 2004",
        "Baker S, Matthews I (2004). Lucas-Kanade 20 years on: a unifying framework. International Journal of Computer "
        "Vision 56:221-255. doi:10.1023/B:VISI.0000011205.11775.fd",
    ),
    "bh": (
        "Benjamini and Hochberg, 1995",
        "Benjamini Y, Hochberg Y (1995). Controlling the false discovery rate: a practical and powerful approach to "
        "multiple testing. Journal of the Royal Statistical Society B 57:289-300. "
        "doi:10.1111/j.2517-6161.1995.tb02031.x",
    ),
    "bids": (
        "Gorgolewski et al., 2016",
        "Gorgolewski KJ, Auer T, Calhoun VD, et al. (2016). The brain imaging data structure, a format for organizing "
        "and describing outputs of neuroimaging experiments. Scientific Data 3:160044. doi:10.1038/sdata.2016.44",
    ),
    "compcor": (
        "Behzadi et al., 2007",
        "Behzadi Y, Restom K, Liau J, Liu TT (2007). A component based noise correction method (CompCor) for BOLD and "
        "perfusion based fMRI. NeuroImage 37:90-101. doi:10.1016/j.neuroimage.2007.04.042",
    ),
    "crossmae": (
        "Fu et al., 2024",
        "Fu L, Lian L, Wang R, et al. (2024). Rethinking patch dependence for masked autoencoders. arXiv:2401.14391",
    ),
    "fmriprep": (
        "Esteban et al., 2019",
        "Esteban O, Markiewicz CJ, Blair RW, et al. (2019). fMRIPrep: a robust preprocessing pipeline for functional "
        "MRI. Nature Methods 16:111-116. doi:10.1038/s41592-018-0235-4",
    ),
    "friston": (
        "Friston et al., 1996",
        "Friston KJ, Williams S, Howard R, Frackowiak RSJ, Turner R (1996). Movement-related effects in fMRI "
        "time-series. Magnetic Resonance in Medicine 35:346-355. doi:10.1002/mrm.1910350312",
    ),
    "fsaverage": (
        "Fischl et al., 1999",
        "Fischl B, Sereno MI, Dale AM (1999). Cortical surface-based analysis II: inflation, flattening, and a "
        "surface-based coordinate system. NeuroImage 9:195-207. doi:10.1006/nimg.1998.0396",
    ),
    "fslr": (
        "Van Essen et al., 2012",
        "Van Essen DC, Glasser MF, Dierker DL, Harwell J, Coalson T (2012). Parcellations and hemispheric asymmetries "
        "of human cerebral cortex analyzed on surface-based atlases. Cerebral Cortex 22:2241-2262. "
        "doi:10.1093/cercor/bhr291",
    ),
    "hcp": (
        "Van Essen et al., 2013",
        "Van Essen DC, Smith SM, Barch DM, et al. (2013). The WU-Minn Human Connectome Project: an overview. "
        "NeuroImage 80:62-79. doi:10.1016/j.neuroimage.2013.05.041",
    ),
    "kumar": (
        "Kumar et al., 2022",
        "Kumar A, Raghunathan A, Jones R, Ma T, Liang P (2022). Fine-tuning can distort pretrained features and "
        "underperform out-of-distribution. ICLR. arXiv:2202.10054",
    ),
    "mae": (
        "He et al., 2022",
        "He K, Chen X, Xie S, Li Y, Dollár P, Girshick R (2022). Masked autoencoders are scalable vision learners. "
        "CVPR. arXiv:2111.06377",
    ),
    "mica_mics": (
        "Royer et al., 2022",
        "Royer J, Rodríguez-Cruces R, Tavakol S, et al. (2022). An open MRI dataset for multiscale neuroscience. "
        "Scientific Data 9:569. doi:10.1038/s41597-022-01682-y",
    ),
    "mni2009": (
        "Fonov et al., 2011",
        "Fonov V, Evans AC, Botteron K, et al. (2011). Unbiased average age-appropriate atlases for pediatric studies. "
        "NeuroImage 54:313-327. doi:10.1016/j.neuroimage.2010.07.033",
    ),
    "mni6": (
        "Evans et al., 2012",
        "Evans AC, Janke AL, Collins DL, Baillet S (2012). Brain templates and atlases. NeuroImage 62:911-922. "
        "doi:10.1016/j.neuroimage.2012.01.024",
    ),
    "n4": (
        "Tustison et al., 2010",
        "Tustison NJ, Avants BB, Cook PA, et al. (2010). N4ITK: improved N3 bias correction. IEEE Transactions on "
        "Medical Imaging 29:1310-1320. doi:10.1109/TMI.2010.2046908",
    ),
    "nilearn": (
        "Abraham et al., 2014",
        "Abraham A, Pedregosa F, Eickenberg M, et al. (2014). Machine learning for neuroimaging with scikit-learn. "
        "Frontiers in Neuroinformatics 8:14. doi:10.3389/fninf.2014.00014",
    ),
    "nsd": (
        "Allen et al., 2022",
        "Allen EJ, St-Yves G, Wu Y, et al. (2022). A massive 7T fMRI dataset to bridge cognitive neuroscience and "
        "artificial intelligence. Nature Neuroscience 25:116-126. doi:10.1038/s41593-021-00962-x",
    ),
    "platt": (
        "Platt, 1999",
        "Platt J (1999). Probabilistic outputs for support vector machines and comparisons to regularized likelihood "
        "methods. Advances in Large Margin Classifiers, MIT Press.",
    ),
    "power": (
        "Power et al., 2012",
        "Power JD, Barnes KA, Snyder AZ, Schlaggar BL, Petersen SE (2012). Spurious but systematic correlations in "
        "functional connectivity MRI networks arise from subject motion. NeuroImage 59:2142-2154. "
        "doi:10.1016/j.neuroimage.2011.10.018",
    ),
    "pytorch": (
        "Paszke et al., 2019",
        "Paszke A, Gross S, Massa F, et al. (2019). PyTorch: an imperative style, high-performance deep learning "
        "library. NeurIPS. arXiv:1912.01703",
    ),
    "rankme": (
        "Garrido et al., 2023",
        "Garrido Q, Balestriero R, Najman L, LeCun Y (2023). RankMe: assessing the downstream performance of "
        "pretrained self-supervised representations by their rank. ICML. arXiv:2210.02885",
    ),
    "rao_wu": (
        "Rao and Wu, 1988",
        "Rao JNK, Wu CFJ (1988). Resampling inference with complex survey data. Journal of the American Statistical "
        "Association 83:231-241. doi:10.1080/01621459.1988.10478591",
    ),
    "rff": (
        "Rahimi and Recht, 2007",
        "Rahimi A, Recht B (2007). Random features for large-scale kernel machines. NeurIPS.",
    ),
    "satterthwaite": (
        "Satterthwaite et al., 2013",
        "Satterthwaite TD, Elliott MA, Gerraty RT, et al. (2013). An improved framework for confound regression and "
        "filtering for control of motion artifact in the preprocessing of resting-state functional connectivity data. "
        "NeuroImage 64:240-256. doi:10.1016/j.neuroimage.2012.08.052",
    ),
    "sgdr": (
        "Loshchilov and Hutter, 2017",
        "Loshchilov I, Hutter F (2017). SGDR: stochastic gradient descent with warm restarts. ICLR. arXiv:1608.03983",
    ),
    "sklearn": (
        "Pedregosa et al., 2011",
        "Pedregosa F, Varoquaux G, Gramfort A, et al. (2011). Scikit-learn: machine learning in Python. Journal of "
        "Machine Learning Research 12:2825-2830.",
    ),
    "syn": (
        "Avants et al., 2008",
        "Avants BB, Epstein CL, Grossman M, Gee JC (2008). Symmetric diffeomorphic image registration with "
        "cross-correlation. Medical Image Analysis 12:26-41. doi:10.1016/j.media.2007.06.004",
    ),
    "transformer": (
        "Vaswani et al., 2017",
        "Vaswani A, Shazeer N, Parmar N, et al. (2017). Attention is all you need. NeurIPS. arXiv:1706.03762",
    ),
    "videomae": (
        "Tong et al., 2022",
        "Tong Z, Song Y, Wang J, Wang L (2022). VideoMAE: masked autoencoders are data-efficient learners for "
        "self-supervised video pre-training. NeurIPS. arXiv:2203.12602",
    ),
    "zero": (
        "Rajbhandari et al., 2020",
        "Rajbhandari S, Rasley J, Ruwase O, He Y (2020). ZeRO: memory optimizations toward training trillion parameter "
        "models. SC20. doi:10.1109/SC41405.2020.00024",
    ),
}


@dataclass(frozen=True)
class Methods:
    """Paragraphs that cite as `(Avants et al., 2011)`, and the references of what they cite, by author."""

    paragraphs: Sequence[str]
    references: Sequence[str]


def methods(paragraphs: Sequence[str]) -> Methods:
    """The paragraphs with their marks resolved."""
    cited = {key for paragraph in paragraphs for mark in MARK.findall(paragraph) for key in keys_of(mark)}
    return Methods(
        [MARK.sub(lambda mark: f"({named(keys_of(mark[1]))})", paragraph) for paragraph in paragraphs],
        sorted(REFERENCES[key][1] for key in cited),
    )


def keys_of(mark: str) -> list[str]:
    """The keys of `@mae; @videomae`."""
    return [key.strip().removeprefix("@") for key in mark.split(";")]


def named(keys: Sequence[str]) -> str:
    """How a sentence names these works."""
    return "; ".join(REFERENCES[key][0] for key in keys)
