//! Mixture of experts: a router picks experts for each token and weighs what they make of it.

use super::{activation, feed_forward::Mlp};
use crate::{
    error::LmError,
    group::Group,
    linear::{Experts, Linear},
    parameters::parameters,
    served::rows,
    weights::Weights,
};
use mlx_cluster_common::spec::{
    Activation, ExpertInputs, ExpertMlpSpec, GroupScore, MoeSpec, Quantization, Ranking, RouterGroups, RouterPrecision, RouterScores,
    RouterSpec,
};
use mlx_rs::{Array, Dtype, fast, ops, stop_gradient};
use std::ops::Range;

/// From this many routed rows on, rows are sorted by expert, so that each expert's weights are read once (as in mlx-lm).
const SORT_FROM: i32 = 64;

#[derive(Debug, Clone)]
pub(super) struct Moe {
    router: Router,
    experts: ExpertMlp,
    shared: Option<Mlp>,
    shared_gate: Option<Linear>,
    into_latent: Option<Linear>,
    out_of_latent: Option<Linear>,
    /// The experts that are here, when others are on other ranks.
    members: Option<Range<u32>>,
    /// Over what the experts' outputs are added up.
    sum: Option<Group>,
    /// The shared expert's output is a part of that sum.
    sums_shared: bool,
}
parameters!(Moe: router, experts, shared, shared_gate, into_latent, out_of_latent);

impl Moe {
    pub(super) fn load(weights: &mut Weights, spec: &MoeSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let router = Router::load(weights, &spec.router, quantization)?;
        let experts = ExpertMlp::load(weights, &spec.experts, quantization)?;
        let mut linear = |linear: Option<&_>| linear.map(|linear| Linear::load(weights, linear, quantization)).transpose();
        let shared_gate = linear(spec.shared.as_ref().and_then(|shared| shared.gate.as_ref()))?;
        let into_latent = linear(spec.latent.as_ref().map(|(into, _)| into))?;
        let out_of_latent = linear(spec.latent.as_ref().map(|(_, out)| out))?;
        let down = &spec.experts.down.path;
        let (members, sum) = (weights.members(down), weights.sum_over(down));
        let mut shared = spec.shared.as_ref().map(|shared| Mlp::load(weights, &shared.mlp, quantization)).transpose()?;
        let mut sums_shared = false;
        if let (Some(mlp), Some(_), None) = (&shared, &sum, &out_of_latent)
            && let Some(partial) = mlp.clone().without_sum()
        {
            (shared, sums_shared) = (Some(partial), true);
        }
        Ok(Self { router, experts, shared, shared_gate, into_latent, out_of_latent, members, sum, sums_shared })
    }

    /// `[B, L, D] -> [B, L, D]`
    pub(super) fn forward(&self, x: &Array) -> Result<Array, LmError> {
        self.forward_with_router_input(x, x)
    }

    /// The same where the router sees something else than the experts.
    pub(super) fn forward_with_router_input(&self, x: &Array, router_input: &Array) -> Result<Array, LmError> {
        let (indices, scores) = self.router.route(router_input)?;
        let (indices, scores) = self.here(indices, scores)?;
        let inner = self.into_latent.as_ref().map_or(Ok(x.clone()), |linear| linear.forward(x))?;
        let y = self.experts.forward(&inner, &indices)?;
        let weighted = ops::multiply(&y, scores.expand_dims(-1)?)?.sum_axis(-2, false)?.as_dtype(y.dtype())?;
        let summed = |y: &Array| self.sum.as_ref().map_or(Ok(y.clone()), |group| group.all_sum(y));
        if self.sums_shared {
            return summed(&self.with_shared(weighted, x)?);
        }
        let weighted = summed(&weighted)?;
        let routed = self.out_of_latent.as_ref().map_or(Ok(weighted.clone()), |linear| linear.forward(&weighted))?;
        self.with_shared(routed, x)
    }

    fn with_shared(&self, routed: Array, x: &Array) -> Result<Array, LmError> {
        let Some(shared) = &self.shared else {
            return Ok(routed);
        };
        let shared = shared.forward(x)?;
        Ok(match &self.shared_gate {
            Some(gate) => ops::add(routed, ops::multiply(ops::sigmoid(gate.forward(x)?)?, shared)?)?,
            None => ops::add(routed, shared)?,
        })
    }

    /// Indices among the experts that are here; those of other ranks become the first, weighed with zero.
    fn here(&self, indices: Array, scores: Array) -> Result<(Array, Array), LmError> {
        let Some(members) = &self.members else {
            return Ok((indices, scores));
        };
        let number = |value: u32| Array::from_int(value as i32).as_dtype(indices.dtype());
        let is_here = ops::logical_and(ops::ge(&indices, number(members.start)?)?, ops::lt(&indices, number(members.end)?)?)?;
        let own = ops::select(&is_here, ops::subtract(&indices, number(members.start)?)?, number(0)?)?;
        Ok((own, ops::select(is_here, &scores, scalar(0.0, &scores)?)?))
    }
}

/// Scores experts, picks the best and weighs them.
#[derive(Debug, Clone)]
struct Router {
    linear: Linear,
    input_scale: Option<Array>,
    input_factor: f32,
    input_eps: f32,
    correction_bias: Option<Array>,
    expert_scale: Option<Array>,
    top_k: i32,
    ranking: Ranking,
    scores: RouterScores,
    precision: RouterPrecision,
    groups: Option<RouterGroups>,
    renormalise: Option<f32>,
    scale: f32,
}
parameters!(Router: linear, input_scale, correction_bias, expert_scale);

impl Router {
    fn load(weights: &mut Weights, spec: &RouterSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let linear = Linear::load(weights, &spec.linear, quantization)?;
        let mut tensor =
            |tensor: Option<&mlx_cluster_common::spec::TensorSpec>| tensor.map(|tensor| weights.take(&tensor.name)).transpose();
        Ok(Self {
            linear,
            input_scale: tensor(spec.input_scale.as_ref().map(|(scale, _)| scale))?,
            input_factor: f64::from(spec.linear.input_dims).powf(-0.5) as f32,
            input_eps: spec.input_scale.as_ref().map_or(0.0, |(_, eps)| *eps),
            correction_bias: tensor(spec.correction_bias.as_ref())?,
            expert_scale: tensor(spec.expert_scale.as_ref())?,
            top_k: spec.top_k as i32,
            ranking: spec.ranking,
            scores: spec.scores,
            precision: spec.precision,
            groups: spec.groups,
            renormalise: spec.renormalise,
            scale: spec.scale,
        })
    }

    /// The experts of each token `[B, L, k]` and their weights.
    fn route(&self, x: &Array) -> Result<(Array, Array), LmError> {
        let scores = self.scores(x)?;
        // Which experts were picked has no gradient; how they are weighed has.
        let indices = stop_gradient(self.pick(&scores)?)?;
        let mut weights = scores.take_along_axis(&indices, -1)?;
        if self.scores == RouterScores::SoftmaxOfPicked {
            weights = ops::softmax_axis(&weights, -1, true)?;
        }
        if let Some(eps) = self.renormalise {
            let sum = weights.sum_axis(-1, true)?;
            let sum = if eps == 0.0 { sum } else { ops::add(&sum, scalar(eps, &sum)?)? };
            weights = ops::divide(&weights, sum)?;
        }
        if self.scale != 1.0 {
            weights = ops::multiply(&weights, scalar(self.scale, &weights)?)?;
        }
        if let Some(scale) = &self.expert_scale {
            weights = ops::multiply(&weights, scale.take_axis(&indices, 0)?)?;
        }
        let is_rounded = self.precision.scores && !self.precision.weights;
        Ok((indices, if is_rounded { weights.as_dtype(x.dtype())? } else { weights }))
    }

    /// What experts are compared by, `[B, L, E]`.
    fn scores(&self, x: &Array) -> Result<Array, LmError> {
        let f32_where = |wanted: bool, y: Array| if wanted { y.as_dtype(Dtype::Float32) } else { Ok(y) };
        let logits = self.linear.forward(&f32_where(self.precision.logits, self.input(x)?)?)?;
        let logits = f32_where(self.precision.scores, logits)?;
        Ok(match self.scores {
            RouterScores::Softmax => ops::softmax_axis(&logits, -1, true)?,
            RouterScores::Sigmoid => ops::sigmoid(logits)?,
            RouterScores::SoftmaxOfPicked => logits,
        })
    }

    fn input(&self, x: &Array) -> Result<Array, LmError> {
        let Some(scale) = &self.input_scale else {
            return Ok(x.clone());
        };
        let scale = ops::multiply(scale, scalar(self.input_factor, scale)?)?;
        Ok(fast::rms_norm(x, Some(&scale), self.input_eps)?)
    }

    /// The `top_k` best of the scores `[B, L, E]`, in no order.
    fn pick(&self, scores: &Array) -> Result<Array, LmError> {
        let corrected = match &self.correction_bias {
            Some(bias) => ops::add(scores, bias)?,
            None => scores.clone(),
        };
        let eligible = match self.groups {
            Some(groups) if groups.count > 1 => only_best_groups(&corrected, groups)?,
            _ => corrected,
        };
        let (k, n) = (self.top_k, eligible.dim(-1));
        Ok(match self.ranking {
            Ranking::BestFirst => ops::argpartition_axis(eligible.negative()?, k - 1, -1)?.split_at_indices(&[k], -1)?.swap_remove(0),
            Ranking::BestLast if k == n => ops::argpartition_axis(eligible, 0, -1)?,
            Ranking::BestLast => ops::argpartition_axis(eligible, -k, -1)?.split_at_indices(&[n - k], -1)?.swap_remove(1),
        })
    }
}

/// Scores `[.., E]` with those of the worse groups set to zero, as DeepSeek's routers do.
fn only_best_groups(scores: &Array, groups: RouterGroups) -> Result<Array, LmError> {
    let (count, dropped) = (groups.count as i32, (groups.count - groups.kept) as i32);
    if dropped == 0 {
        return Ok(scores.clone());
    }
    let shape = scores.shape().to_vec();
    let grouped = scores.reshape(&[shape[0], shape[1], count, -1])?;
    let by_group = match groups.by {
        GroupScore::Best => grouped.max_axis(-1, true)?,
        GroupScore::SumOfBestTwo => ops::indexing::topk_axis(&grouped, 2, -1)?.sum_axis(-1, true)?,
    };
    let worst = ops::argpartition_axis(&by_group, dropped - 1, -2)?.split_at_indices(&[dropped], -2)?.swap_remove(0);
    let worst = ops::broadcast_to(&worst, &[shape[0], shape[1], dropped, grouped.dim(-1)])?;
    let kept = grouped.put_along_axis(worst, scalar(0.0, scores)?, -2)?;
    Ok(kept.reshape(&shape)?)
}

/// The experts' MLPs, stacked.
#[derive(Debug, Clone)]
struct ExpertMlp {
    inputs: Vec<Experts>,
    activation: Activation,
    down: Experts,
}
parameters!(ExpertMlp: inputs, down);

impl ExpertMlp {
    fn load(weights: &mut Weights, spec: &ExpertMlpSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let mut load = |experts| Experts::load(weights, experts, quantization);
        let inputs = match &spec.inputs {
            ExpertInputs::Gated { gate, up } => vec![load(gate)?, load(up)?],
            ExpertInputs::Plain(up) => vec![load(up)?],
        };
        Ok(Self { inputs, activation: spec.activation, down: load(&spec.down)? })
    }

    /// `x` `[B, L, D]` through the experts `indices` `[B, L, k]`: `[B, L, k, D]`.
    fn forward(&self, x: &Array, indices: &Array) -> Result<Array, LmError> {
        let expanded = x.expand_dims_axes(&[-2, -3])?;
        if (indices.size() as i32) < SORT_FROM {
            return Ok(self.apply(&expanded, indices, false)?.squeeze_axes(&[-2])?);
        }
        let top_k = indices.dim(-1);
        let flat = indices.flatten(None, None)?;
        let order = ops::argsort_axis(&flat, -1)?;
        let back = ops::argsort_axis(&order, -1)?;
        let row = ops::floor_divide(&order, Array::from_int(top_k).as_dtype(order.dtype())?)?;
        let sorted = expanded.reshape(&[-1, 1, x.dim(-1)])?.take_axis(&row, 0)?;
        let y = rows::with_picked(&row, || self.apply(&sorted, &flat.take_axis(&order, 0)?, true))?.take_axis(back, 0)?;
        let shape = [indices.shape(), &[y.dim(-1)]].concat();
        Ok(y.reshape(&shape)?)
    }

    fn apply(&self, x: &Array, indices: &Array, sorted: bool) -> Result<Array, LmError> {
        let inner = match self.inputs.as_slice() {
            [gate, up] => {
                let (up, gate) = (up.forward(x, indices, sorted)?, gate.forward(x, indices, sorted)?);
                activation::gated(self.activation, &gate, &up)?
            }
            [up] => activation::plain(self.activation, &up.forward(x, indices, sorted)?)?,
            _ => return Err(LmError::Mlx("an expert has one or two input linears".into())),
        };
        self.down.forward(&inner, indices, sorted)
    }
}

fn scalar(value: f32, like: &Array) -> Result<Array, LmError> {
    Ok(Array::from_f32(value).as_dtype(like.dtype())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlx_cluster_common::spec::{LinearSpec, TensorSpec};

    const LOGITS: [f32; 8] = [0.5, -1.0, 2.0, 0.25, 1.5, -0.5, 0.75, 1.25];
    const BIAS: [f32; 8] = [0.3, 0.9, -0.4, 0.0, -0.6, 0.5, 0.1, -0.2];
    const GROUPS: RouterGroups = RouterGroups { count: 4, kept: 2, by: GroupScore::SumOfBestTwo };

    fn linear() -> LinearSpec {
        LinearSpec::new("gate", 8, 8, false)
    }

    fn sigmoid(top_k: u32) -> RouterSpec {
        RouterSpec::sigmoid(linear(), top_k, Some(TensorSpec::new("bias", &[8])))
    }

    /// Experts and weights of a token of this type, whose logits are `LOGITS`.
    fn route(spec: &RouterSpec, dtype: Dtype) -> (Vec<u32>, Array) {
        let gate = Array::eye::<f32>(8, None, None).and_then(|gate| gate.as_dtype(dtype)).expect("an identity");
        let mut weights = Weights::from_arrays([("gate.weight".into(), gate), ("bias".into(), Array::from_slice(&BIAS, &[8]))]);
        let router = Router::load(&mut weights, spec, &Quantization::default()).expect("loads");
        let x = Array::from_slice(&LOGITS, &[1, 1, 8]).as_dtype(dtype).expect("casts");
        let (indices, weights) = router.route(&x).expect("routes");
        assert_eq!((indices.shape(), weights.shape()), (&[1, 1, spec.top_k as i32][..], &[1, 1, spec.top_k as i32][..]));
        (indices.as_dtype(Dtype::Uint32).expect("casts").as_slice().to_vec(), weights)
    }

    /// Sorted by expert.
    fn routed(spec: &RouterSpec) -> Vec<(u32, f32)> {
        let (experts, weights) = route(spec, Dtype::Float32);
        let mut routed: Vec<_> = experts.into_iter().zip(weights.as_slice::<f32>().to_vec()).collect();
        routed.sort_by_key(|(expert, _)| *expert);
        routed
    }

    #[track_caller]
    fn assert_routed(spec: &RouterSpec, wanted: [(u32, f32); 3]) {
        let found = routed(spec);
        let close = |((expert, weight), (wanted, exact)): (&(u32, f32), &(u32, f32))| expert == wanted && (weight - exact).abs() < 1e-6;
        assert!(found.iter().zip(&wanted).all(close), "{found:?} instead of {wanted:?}");
    }

    // The numbers are those of mlx-lm's modules for the same logits and bias.

    #[test]
    fn softmax_before_and_after_picking() {
        let (all, renormalised) = (RouterSpec::softmax(linear(), 3, false), RouterSpec::softmax(linear(), 3, true));
        assert_routed(&all, [(2, 0.345_521_3), (4, 0.209_569_2), (7, 0.163_212_7)]);
        let of_picked = [(2, 0.481_024_3), (4, 0.291_756), (7, 0.227_219_8)];
        assert_routed(&renormalised, of_picked);
        assert_routed(&RouterSpec::softmax_of_picked(linear(), 3), of_picked);
    }

    #[test]
    fn a_bias_corrects_what_is_picked_and_not_how_it_is_weighed() {
        let plain = RouterSpec { scale: 2.5, ..sigmoid(3) };
        assert_routed(&plain, [(0, 1.556_148_3), (1, 0.672_353_6), (5, 0.943_851_7)]);
        let renormalised = RouterSpec { scale: 1.5, renormalise: Some(0.0), ..sigmoid(3) };
        assert_routed(&renormalised, [(0, 0.735_801_5), (1, 0.317_912_3), (5, 0.446_286_2)]);
        let with_eps = RouterSpec { scale: 3.0, renormalise: Some(1e-20), ..sigmoid(3) };
        assert_routed(&with_eps, [(0, 1.471_602_9), (1, 0.635_824_7), (5, 0.892_572_4)]);
    }

    #[test]
    fn experts_of_worse_groups_cannot_be_picked() {
        let of_sigmoids = RouterSpec { groups: Some(GROUPS), renormalise: Some(0.0), ..sigmoid(3) };
        assert_routed(&of_sigmoids, [(0, 0.396_324_6), (1, 0.171_237_1), (6, 0.432_438_3)]);
        let of_softmax = RouterSpec { scores: RouterScores::Softmax, renormalise: Some(1e-20), scale: 2.0, ..of_sigmoids.clone() };
        assert_routed(&of_softmax, [(0, 0.797_716_7), (1, 0.177_994_7), (6, 1.024_288_5)]);
        let by_best = RouterGroups { kept: 1, by: GroupScore::Best, ..GROUPS };
        let single = RouterSpec { groups: Some(by_best), top_k: 2, ..RouterSpec::softmax(linear(), 2, false) };
        assert_eq!(routed(&single).into_iter().map(|(expert, _)| expert).collect::<Vec<_>>(), [2, 3]);
        let all_kept = RouterSpec { groups: Some(RouterGroups { kept: 4, ..GROUPS }), ..sigmoid(3) };
        assert_eq!(routed(&all_kept), routed(&sigmoid(3)));
    }

    #[test]
    fn either_end_gives_the_same_experts_and_all_can_be_picked() {
        for top_k in [1, 3, 8] {
            let last = RouterSpec::softmax(linear(), top_k, true);
            let first = RouterSpec { ranking: Ranking::BestFirst, ..last.clone() };
            assert_eq!(routed(&last).len(), top_k as usize);
            for ((a, x), (b, y)) in routed(&last).into_iter().zip(routed(&first)) {
                assert!(a == b && (x - y).abs() < 1e-6, "{top_k}");
            }
        }
    }

    #[test]
    fn weights_have_the_type_that_is_wanted() {
        let dtype = |spec: &RouterSpec| route(spec, Dtype::Bfloat16).1.dtype();
        assert_eq!(dtype(&RouterSpec::softmax(linear(), 2, true)), Dtype::Bfloat16);
        assert_eq!(dtype(&sigmoid(2)), Dtype::Float32);
        let rounded = RouterPrecision { logits: true, scores: true, weights: false };
        assert_eq!(dtype(&RouterSpec { precision: rounded, ..sigmoid(2) }), Dtype::Bfloat16);
        assert_eq!(dtype(&RouterSpec { precision: RouterPrecision::SCORES, ..RouterSpec::softmax_of_picked(linear(), 2) }), Dtype::Float32);
    }
}
