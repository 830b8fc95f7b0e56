"""Whom to cite for the parts of netwright that come from publications without a card of their own."""

from __future__ import annotations

from netwright.papers.index import Reference

HYDRA = Reference(
    title="HYDRA: Pruning Adversarially Robust Neural Networks",
    authors=("Vikash Sehwag", "Shiqi Wang", "Prateek Mittal", "Suman Jana"),
    year=2020,
    venue="Advances in Neural Information Processing Systems",
    kind="inproceedings",
    arxiv="2002.10509",
)
HIPPO = Reference(
    title="HiPPO: Recurrent Memory with Optimal Polynomial Projections",
    authors=("Albert Gu", "Tri Dao", "Stefano Ermon", "Atri Rudra", "Christopher Ré"),
    year=2020,
    venue="Advances in Neural Information Processing Systems",
    kind="inproceedings",
    arxiv="2008.07669",
)
HIDDEN_NETWORKS = Reference(
    title="What's Hidden in a Randomly Weighted Neural Network?",
    authors=(
        "Vivek Ramanujan",
        "Mitchell Wortsman",
        "Aniruddha Kembhavi",
        "Ali Farhadi",
        "Mohammad Rastegari",
    ),
    year=2020,
    venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    kind="inproceedings",
    arxiv="1911.13299",
)
MAGNITUDE_PRUNING = Reference(
    title="Learning both Weights and Connections for Efficient Neural Networks",
    authors=("Song Han", "Jeff Pool", "John Tran", "William J. Dally"),
    year=2015,
    venue="Advances in Neural Information Processing Systems",
    kind="inproceedings",
    arxiv="1506.02626",
)
GRADUAL_PRUNING = Reference(
    title="To prune, or not to prune: exploring the efficacy of pruning for model compression",
    authors=("Michael Zhu", "Suyog Gupta"),
    year=2017,
    arxiv="1710.01878",
)
DARTS = Reference(
    title="DARTS: Differentiable Architecture Search",
    authors=("Hanxiao Liu", "Karen Simonyan", "Yiming Yang"),
    year=2019,
    venue="International Conference on Learning Representations",
    kind="inproceedings",
    arxiv="1806.09055",
)
RANDOM_SEARCH = Reference(
    title="Random Search and Reproducibility for Neural Architecture Search",
    authors=("Liam Li", "Ameet Talwalkar"),
    year=2019,
    venue="Conference on Uncertainty in Artificial Intelligence",
    kind="inproceedings",
    arxiv="1902.07638",
)
MOBILENET_V2 = Reference(
    title="MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    authors=("Mark Sandler", "Andrew Howard", "Menglong Zhu", "Andrey Zhmoginov", "Liang-Chieh Chen"),
    year=2018,
    venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    kind="inproceedings",
    arxiv="1801.04381",
)
RESNET = Reference(
    title="Deep Residual Learning for Image Recognition",
    authors=("Kaiming He", "Xiangyu Zhang", "Shaoqing Ren", "Jian Sun"),
    year=2016,
    venue="IEEE Conference on Computer Vision and Pattern Recognition",
    kind="inproceedings",
    arxiv="1512.03385",
)
LENET = Reference(
    title="Gradient-based learning applied to document recognition",
    authors=("Yann LeCun", "Léon Bottou", "Yoshua Bengio", "Patrick Haffner"),
    year=1998,
    venue="Proceedings of the IEEE",
    kind="article",
    doi="10.1109/5.726791",
)
CALIBRATION = Reference(
    title="Self-Knowledge Distillation with Progressive Refinement of Targets",
    authors=("Kyungyul Kim", "ByeongMoon Ji", "Doyoung Yoon", "Sangheum Hwang"),
    year=2021,
    venue="IEEE/CVF International Conference on Computer Vision",
    kind="inproceedings",
    arxiv="2006.12000",
)
CUTOUT = Reference(
    title="Improved Regularization of Convolutional Neural Networks with Cutout",
    authors=("Terrance DeVries", "Graham W. Taylor"),
    year=2017,
    arxiv="1708.04552",
)
MIXUP = Reference(
    title="mixup: Beyond Empirical Risk Minimization",
    authors=("Hongyi Zhang", "Moustapha Cisse", "Yann N. Dauphin", "David Lopez-Paz"),
    year=2018,
    venue="International Conference on Learning Representations",
    kind="inproceedings",
    arxiv="1710.09412",
)
DENSE_SPARSE_DENSE = Reference(
    title="DSD: Dense-Sparse-Dense Training for Deep Neural Networks",
    authors=(
        "Song Han",
        "Jeff Pool",
        "Sharan Narang",
        "Huizi Mao",
        "Enhao Gong",
        "Shijian Tang",
        "Erich Elsen",
        "Peter Vajda",
        "Manohar Paluri",
        "John Tran",
        "Bryan Catanzaro",
        "William J. Dally",
    ),
    year=2017,
    venue="International Conference on Learning Representations",
    kind="inproceedings",
    arxiv="1607.04381",
)
LAMP = Reference(
    title="Layer-adaptive Sparsity for the Magnitude-based Pruning",
    authors=("Jaeho Lee", "Sejun Park", "Sangwoo Mo", "Sungsoo Ahn", "Jinwoo Shin"),
    year=2021,
    venue="International Conference on Learning Representations",
    kind="inproceedings",
    arxiv="2010.07611",
)
BATCH_NORM = Reference(
    title="Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    authors=("Sergey Ioffe", "Christian Szegedy"),
    year=2015,
    venue="International Conference on Machine Learning",
    kind="inproceedings",
    arxiv="1502.03167",
)
COSINE = Reference(
    title="SGDR: Stochastic Gradient Descent with Warm Restarts",
    authors=("Ilya Loshchilov", "Frank Hutter"),
    year=2017,
    venue="International Conference on Learning Representations",
    kind="inproceedings",
    arxiv="1608.03983",
)
BOOTSTRAP = Reference(
    title="Bootstrap Methods: Another Look at the Jackknife",
    authors=("Bradley Efron",),
    year=1979,
    venue="The Annals of Statistics",
    kind="article",
    doi="10.1214/aos/1176344552",
)
GRAD_CAM_PLUS_PLUS = Reference(
    title="Grad-CAM++: Generalized Gradient-Based Visual Explanations for Deep Convolutional Networks",
    authors=("Aditya Chattopadhay", "Anirban Sarkar", "Prantik Howlader", "Vineeth N Balasubramanian"),
    year=2018,
    venue="IEEE Winter Conference on Applications of Computer Vision",
    kind="inproceedings",
    arxiv="1710.11063",
)
GRAD_CAM = Reference(
    title="Grad-CAM: Visual Explanations from Deep Networks via Gradient-Based Localization",
    authors=(
        "Ramprasaath R. Selvaraju",
        "Michael Cogswell",
        "Abhishek Das",
        "Ramakrishna Vedantam",
        "Devi Parikh",
        "Dhruv Batra",
    ),
    year=2017,
    venue="IEEE International Conference on Computer Vision",
    kind="inproceedings",
    arxiv="1610.02391",
)
POINTING_GAME = Reference(
    title="Top-down Neural Attention by Excitation Backprop",
    authors=("Jianming Zhang", "Zhe Lin", "Jonathan Brandt", "Xiaohui Shen", "Stan Sclaroff"),
    year=2016,
    venue="European Conference on Computer Vision",
    kind="inproceedings",
    arxiv="1608.00507",
)
ELASTIC = Reference(
    title="Best Practices for Convolutional Neural Networks Applied to Visual Document Analysis",
    authors=("Patrice Y. Simard", "Dave Steinkraus", "John C. Platt"),
    year=2003,
    venue="International Conference on Document Analysis and Recognition",
    kind="inproceedings",
    doi="10.1109/ICDAR.2003.1227801",
)
GCN = Reference(
    title="Semi-Supervised Classification with Graph Convolutional Networks",
    authors=("Thomas N. Kipf", "Max Welling"),
    year=2017,
    venue="International Conference on Learning Representations",
    kind="inproceedings",
    arxiv="1609.02907",
)
SGC = Reference(
    title="Simplifying Graph Convolutional Networks",
    authors=(
        "Felix Wu",
        "Tianyi Zhang",
        "Amauri Holanda de Souza Jr.",
        "Christopher Fifty",
        "Tao Yu",
        "Kilian Q. Weinberger",
    ),
    year=2019,
    venue="International Conference on Machine Learning",
    kind="inproceedings",
    arxiv="1902.07153",
)
APPNP = Reference(
    title="Predict then Propagate: Graph Neural Networks meet Personalized PageRank",
    authors=("Johannes Gasteiger", "Aleksandar Bojchevski", "Stephan Günnemann"),
    year=2019,
    venue="International Conference on Learning Representations",
    kind="inproceedings",
    arxiv="1810.05997",
)
PLANETOID = Reference(
    title="Revisiting Semi-Supervised Learning with Graph Embeddings",
    authors=("Zhilin Yang", "William W. Cohen", "Ruslan Salakhutdinov"),
    year=2016,
    venue="International Conference on Machine Learning",
    kind="inproceedings",
    arxiv="1603.08861",
)
FORGETTING = Reference(
    title="Riemannian Walk for Incremental Learning: Understanding Forgetting and Intransigence",
    authors=("Arslan Chaudhry", "Puneet K. Dokania", "Thalaiyasingam Ajanthan", "Philip H. S. Torr"),
    year=2018,
    venue="European Conference on Computer Vision",
    kind="inproceedings",
    arxiv="1801.10112",
)
PART_DEPENDENT_NOISE = Reference(
    title="Part-dependent Label Noise: Towards Instance-dependent Label Noise",
    authors=(
        "Xiaobo Xia",
        "Tongliang Liu",
        "Bo Han",
        "Nannan Wang",
        "Mingming Gong",
        "Haifeng Liu",
        "Gang Niu",
        "Dacheng Tao",
        "Masashi Sugiyama",
    ),
    year=2020,
    venue="Advances in Neural Information Processing Systems",
    kind="inproceedings",
    arxiv="2006.07836",
)
MEAN_TEACHER = Reference(
    title=(
        "Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep "
        "learning results"
    ),
    authors=("Antti Tarvainen", "Harri Valpola"),
    year=2017,
    venue="Advances in Neural Information Processing Systems",
    kind="inproceedings",
    arxiv="1703.01780",
)
SIMCLR = Reference(
    title="A Simple Framework for Contrastive Learning of Visual Representations",
    authors=("Ting Chen", "Simon Kornblith", "Mohammad Norouzi", "Geoffrey Hinton"),
    year=2020,
    venue="International Conference on Machine Learning",
    kind="inproceedings",
    arxiv="2002.05709",
)
MOCO = Reference(
    title="Momentum Contrast for Unsupervised Visual Representation Learning",
    authors=("Kaiming He", "Haoqi Fan", "Yuxin Wu", "Saining Xie", "Ross Girshick"),
    year=2020,
    venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    kind="inproceedings",
    arxiv="1911.05722",
)
SIMSIAM = Reference(
    title="Exploring Simple Siamese Representation Learning",
    authors=("Xinlei Chen", "Kaiming He"),
    year=2021,
    venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    kind="inproceedings",
    arxiv="2011.10566",
)
SUPERVISED_CONTRASTIVE = Reference(
    title="Supervised Contrastive Learning",
    authors=(
        "Prannay Khosla",
        "Piotr Teterwak",
        "Chen Wang",
        "Aaron Sarna",
        "Yonglong Tian",
        "Phillip Isola",
        "Aaron Maschinot",
        "Ce Liu",
        "Dilip Krishnan",
    ),
    year=2020,
    venue="Advances in Neural Information Processing Systems",
    kind="inproceedings",
    arxiv="2004.11362",
)
ALIGNMENT_AND_UNIFORMITY = Reference(
    title="Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere",
    authors=("Tongzhou Wang", "Phillip Isola"),
    year=2020,
    venue="International Conference on Machine Learning",
    kind="inproceedings",
    arxiv="2005.10242",
)
CONTRASTIVE_CROP = Reference(
    title="Crafting Better Contrastive Views for Siamese Representation Learning",
    authors=("Xiangyu Peng", "Kai Wang", "Zheng Zhu", "Mang Wang", "Yang You"),
    year=2022,
    venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    kind="inproceedings",
    arxiv="2202.03278",
)
INSTANCE_DISCRIMINATION = Reference(
    title="Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
    authors=("Zhirong Wu", "Yuanjun Xiong", "Stella X. Yu", "Dahua Lin"),
    year=2018,
    venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    kind="inproceedings",
    arxiv="1805.01978",
)

# Module, or module and name; the longest match wins, and a card's own method wins over all.
STYLE_GENERATOR = Reference(
    title="A Style-Based Generator Architecture for Generative Adversarial Networks",
    authors=("Tero Karras", "Samuli Laine", "Timo Aila"),
    year=2019,
    venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    kind="inproceedings",
    arxiv="1812.04948",
)
MULTI_CODE = Reference(
    title="Image Processing Using Multi-Code GAN Prior",
    authors=("Jinjin Gu", "Yujun Shen", "Bolei Zhou"),
    year=2020,
    venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    kind="inproceedings",
    arxiv="1912.07116",
)
CLOSED_FORM = Reference(
    title="Closed-Form Factorization of Latent Semantics in GANs",
    authors=("Yujun Shen", "Bolei Zhou"),
    year=2021,
    venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    kind="inproceedings",
    arxiv="2007.06600",
)

CITATIONS: dict[str, Reference] = {
    "netwright.compress.callbacks.pruning:GradualPruning": GRADUAL_PRUNING,
    "netwright.compress.exact:lamp_scores": LAMP,
    "netwright.compress.hydra": HYDRA,
    "netwright.compress.prune": MAGNITUDE_PRUNING,
    "netwright.compress.prune:cubic_sparsity": GRADUAL_PRUNING,
    "netwright.compress.prune:dense_sparse_dense": DENSE_SPARSE_DENSE,
    "netwright.data.augment:Cutout": CUTOUT,
    "netwright.data.augment:mixup": MIXUP,
    "netwright.data.crops:CenterCrop2": CONTRASTIVE_CROP,
    "netwright.data.elastic": ELASTIC,
    "netwright.data.label_noise:instance_noise": PART_DEPENDENT_NOISE,
    "netwright.data.streams:continual_metrics": FORGETTING,
    "netwright.explain.gradient": GRAD_CAM,
    "netwright.explain.localization": GRAD_CAM,
    "netwright.explain.localization:pointing_game": POINTING_GAME,
    "netwright.metrics": CALIBRATION,
    "netwright.nn.activations:class_map": GRAD_CAM_PLUS_PLUS,
    "netwright.nn.batchnorm": BATCH_NORM,
    "netwright.nn.convnet:LeNet": LENET,
    "netwright.nn.dagnn.baselines:APPNP": APPNP,
    "netwright.nn.dagnn.baselines:GCN": GCN,
    "netwright.nn.dagnn.baselines:SGC": SGC,
    "netwright.data.planetoid": PLANETOID,
    "netwright.nn.lssl.measures": HIPPO,
    "netwright.nn.mbconv": MOBILENET_V2,
    "netwright.nn.resnet": RESNET,
    "netwright.nn.sparse": HIDDEN_NETWORKS,
    "netwright.papers.evidence.statistics": BOOTSTRAP,
    "netwright.search.bilevel": DARTS,
    "netwright.search.darts": DARTS,
    "netwright.search.genotype": DARTS,
    "netwright.search.random_search": RANDOM_SEARCH,
    "netwright.search.selection": DARTS,
    "netwright.search.spaces": DARTS,
    "netwright.search.supernet": DARTS,
    "netwright.train.contrastive.hosts:MoCo": MOCO,
    "netwright.train.contrastive.hosts:SimCLR": SIMCLR,
    "netwright.train.contrastive.hosts:SimSiam": SIMSIAM,
    "netwright.train.contrastive.losses:alignment": ALIGNMENT_AND_UNIFORMITY,
    "netwright.train.contrastive.losses:info_nce": MOCO,
    "netwright.train.contrastive.losses:negative_cosine": SIMSIAM,
    "netwright.train.contrastive.losses:nt_xent": SIMCLR,
    "netwright.train.contrastive.losses:supcon": SUPERVISED_CONTRASTIVE,
    "netwright.train.contrastive.losses:uniformity": ALIGNMENT_AND_UNIFORMITY,
    "netwright.train.contrastive.probes:knn_probe": INSTANCE_DISCRIMINATION,
    "netwright.train.ema": MEAN_TEACHER,
    "netwright.train.natra.codes:LatentCodes": MULTI_CODE,
    "netwright.train.natra.directions:latent_directions": CLOSED_FORM,
    "netwright.train.natra.generator:StyleGenerator": STYLE_GENERATOR,
    "netwright.train.schedules:CosineProgress": COSINE,
}
