//! Choosing tokens from logits, on the last stage. Each row is computed by itself, so a request's tokens do not depend on its neighbours.

use crate::{error::LmError, ffi, group::Group};
use mlx_cluster_common::{
    ids::SequenceId,
    request::TokenOut,
    sampling::{REPETITION_WINDOW, SamplingParams},
};
use mlx_rs::{Array, Dtype, ops, ops::indexing, random};
use std::collections::BTreeMap;

/// What the last stage remembers of the sequences it samples for.
#[derive(Debug, Default)]
pub struct Sampler {
    sequences: BTreeMap<SequenceId, State>,
    /// Whose ranks have to agree on the tokens.
    group: Option<Group>,
}

#[derive(Debug)]
struct State {
    params: SamplingParams,
    /// The last tokens, for the repetition penalty.
    recent: Vec<Recent>,
    /// `[1, V]`: how often each token was generated; only kept when a penalty asks for it.
    counts: Option<Array>,
    /// `[1, V]` added to the logits.
    bias: Option<Array>,
    /// The token sampled last, which the host may not know yet, `[1]`.
    last: Option<Array>,
    /// Log-probabilities `[1, V]` after the last token of the prompt's part that was read, for the next part's first token.
    prompt_end: Option<Array>,
}

#[derive(Debug, Clone)]
enum Recent {
    Known(u32),
    /// `[1]`
    Sampled(Array),
}

/// A row of logits to sample from: the token of index `index` of its sequence.
#[derive(Debug, Clone, Copy)]
pub struct Draw {
    pub sequence: SequenceId,
    pub index: u32,
}

/// Tokens that were drawn, still lazy.
#[derive(Debug)]
pub struct Sampled {
    pub sequences: Vec<SequenceId>,
    /// `[R]`
    pub ids: Array,
    /// Alternatives wanted for each row; None where no log-probability is.
    wanted: Vec<Option<u32>>,
    probabilities: Option<Probabilities>,
}

/// The most likely tokens of a row with their log-probabilities, best first.
type Alternatives = Vec<(u32, f32)>;

/// Log-probabilities of chosen tokens and of the best ones, still lazy.
#[derive(Debug)]
pub struct Probabilities {
    /// `[R]`
    chosen: Array,
    /// `[R, N]`, best first.
    top: Option<(Array, Array)>,
}

impl Sampler {
    /// All ranks draw from the same logits, and take what rank 0 drew: machines may differ in the last bits.
    pub fn of_group(group: Option<Group>) -> Self {
        Self { sequences: BTreeMap::new(), group }
    }

    pub fn admit(&mut self, sequence: SequenceId, params: SamplingParams, vocab_size: u32) -> Result<(), LmError> {
        let bias = (!params.logit_bias.is_empty()).then(|| {
            let mut bias = vec![0f32; vocab_size as usize];
            for &(token, value) in &params.logit_bias {
                if let Some(slot) = bias.get_mut(token as usize) {
                    *slot += value;
                }
            }
            Array::from_slice(&bias, &[1, vocab_size as i32])
        });
        let counted = params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        let counts = counted.then(|| ops::zeros_dtype(&[1, vocab_size as i32], Dtype::Float32)).transpose()?;
        let state = State { params, recent: Vec::new(), counts, bias, last: None, prompt_end: None };
        self.sequences.insert(sequence, state);
        Ok(())
    }

    pub fn release(&mut self, sequence: SequenceId) {
        self.sequences.remove(&sequence);
    }

    pub fn clear(&mut self) {
        self.sequences.clear();
    }

    /// Tells the sampler of prompt tokens that the stage has read.
    pub fn observe(&mut self, sequence: SequenceId, tokens: &[u32]) -> Result<(), LmError> {
        let state = self.state(sequence)?;
        if state.params.repetition_penalty != 1.0 {
            let tail = &tokens[tokens.len().saturating_sub(REPETITION_WINDOW)..];
            state.remember(tail.iter().map(|token| Recent::Known(*token)));
        }
        Ok(())
    }

    /// The token sampled last for a sequence, `[1]`.
    pub fn last(&self, sequence: SequenceId) -> Option<&Array> {
        self.sequences.get(&sequence).and_then(|state| state.last.as_ref())
    }

    fn state(&mut self, sequence: SequenceId) -> Result<&mut State, LmError> {
        self.sequences.get_mut(&sequence).ok_or(LmError::UnknownSequence { sequence })
    }

    /// Draws a token for each row of `logits` `[R, V]`.
    pub fn sample(&mut self, logits: &Array, draws: &[Draw]) -> Result<Sampled, LmError> {
        let mut wanted = Vec::with_capacity(draws.len());
        let (mut adjusted, mut all_greedy) = (false, true);
        for draw in draws {
            let state = self.state(draw.sequence)?;
            wanted.push(state.params.logprobs);
            adjusted |= state.adjusts();
            all_greedy &= state.params.is_greedy();
        }
        let logits = match adjusted {
            true => self.adjust(logits, draws)?,
            false => logits.clone(),
        };
        let greedy = indexing::argmax_axis(&logits, -1, false)?;
        let needs_logprobs = !all_greedy || wanted.iter().any(Option::is_some);
        let logprobs = needs_logprobs.then(|| log_softmax(&logits)).transpose()?;
        let ids = match &logprobs {
            Some(logprobs) if !all_greedy => self.draw(logprobs, &greedy, draws)?,
            _ => greedy,
        };
        let ids = self.group.as_ref().map_or(Ok(ids.clone()), |group| group.of_first(&ids))?;
        self.remember(&ids, draws)?;
        let probabilities = match (wanted.iter().flatten().max(), &logprobs) {
            (Some(n), Some(logprobs)) => Some(Probabilities::of(logprobs, &ids, *n)?),
            _ => None,
        };
        Ok(Sampled { sequences: draws.iter().map(|draw| draw.sequence).collect(), ids, wanted, probabilities })
    }

    fn adjust(&mut self, logits: &Array, draws: &[Draw]) -> Result<Array, LmError> {
        let mut rows = Vec::with_capacity(draws.len());
        for (r, draw) in draws.iter().enumerate() {
            rows.push(self.state(draw.sequence)?.adjust(row(logits, r)?)?);
        }
        Ok(ops::concatenate(&rows, 0)?)
    }

    fn draw(&mut self, logprobs: &Array, greedy: &Array, draws: &[Draw]) -> Result<Array, LmError> {
        let mut ids = Vec::with_capacity(draws.len());
        for (r, draw) in draws.iter().enumerate() {
            let params = &self.state(draw.sequence)?.params;
            ids.push(match params.is_greedy() {
                true => element(greedy, r)?,
                false => draw_row(row(logprobs, r)?, params, draw.index)?,
            });
        }
        Ok(ops::concatenate(&ids, 0)?)
    }

    fn remember(&mut self, ids: &Array, draws: &[Draw]) -> Result<(), LmError> {
        for (r, draw) in draws.iter().enumerate() {
            let state = self.state(draw.sequence)?;
            let id = if draws.len() == 1 { ids.clone() } else { element(ids, r)? };
            if let Some(counts) = &state.counts {
                let index = id.reshape(&[1, 1])?;
                let more = ops::add(counts.take_along_axis(&index, -1)?, Array::from_f32(1.0))?;
                state.counts = Some(counts.put_along_axis(&index, &more, -1)?);
            }
            if state.params.repetition_penalty != 1.0 {
                state.remember([Recent::Sampled(id.clone())]);
            }
            state.last = Some(id);
        }
        Ok(())
    }

    /// Log-probabilities of a prompt's tokens: `logits` `[L, V]` are those after each of `tokens`. Gives the first token's own too when
    /// the part before it was read with log-probabilities; None for the very first token.
    pub fn prompt(&mut self, sequence: SequenceId, tokens: &[u32], logits: &Array) -> Result<PromptProbabilities, LmError> {
        let state = self.state(sequence)?;
        let n = state.params.prompt_logprobs.unwrap_or(0);
        let logprobs = log_softmax(logits)?;
        let length = tokens.len();
        let before = state.prompt_end.replace(row(&logprobs, length - 1)?);
        let first_known = before.is_some();
        let earlier = ffi::slice(&logprobs, &[0, 0], &[length as i32 - 1, logprobs.dim(1)])?;
        let (rows, targets) = match before {
            Some(before) => (ops::concatenate(&[before, earlier], 0)?, tokens),
            None => (earlier, &tokens[1..]),
        };
        let probabilities = match targets.is_empty() {
            true => None,
            false => Some(Probabilities::of(&rows, &Array::from_slice(targets, &[targets.len() as i32]), n)?),
        };
        Ok(PromptProbabilities { tokens: tokens.to_vec(), first_known, n, probabilities })
    }
}

impl State {
    fn adjusts(&self) -> bool {
        self.bias.is_some() || self.counts.is_some() || !self.recent.is_empty()
    }

    fn remember(&mut self, tokens: impl IntoIterator<Item = Recent>) {
        self.recent.extend(tokens);
        let surplus = self.recent.len().saturating_sub(REPETITION_WINDOW);
        self.recent.drain(..surplus);
    }

    /// Logit bias, then penalties, as mlx-lm's logits processors.
    fn adjust(&self, mut logits: Array) -> Result<Array, LmError> {
        let scalar = |value: f32| Array::from_f32(value);
        if let Some(bias) = &self.bias {
            logits = ops::add(&logits, bias)?;
        }
        if !self.recent.is_empty() {
            let recent = self.recent_ids()?;
            let chosen = logits.take_along_axis(&recent, -1)?;
            let penalty = scalar(self.params.repetition_penalty).as_dtype(logits.dtype())?;
            let zero = scalar(0.0).as_dtype(logits.dtype())?;
            let lowered = ops::select(ops::lt(&chosen, zero)?, ops::multiply(&chosen, &penalty)?, ops::divide(&chosen, &penalty)?)?;
            logits = logits.put_along_axis(&recent, &lowered, -1)?;
        }
        if let Some(counts) = &self.counts {
            let present = ops::gt(counts, scalar(0.0))?.as_dtype(Dtype::Float32)?;
            let presence = ops::multiply(present, scalar(self.params.presence_penalty))?;
            let frequency = ops::multiply(counts, scalar(self.params.frequency_penalty))?;
            logits = ops::subtract(&logits, ops::add(presence, frequency)?)?;
        }
        Ok(logits)
    }

    /// `[1, n]`
    fn recent_ids(&self) -> Result<Array, LmError> {
        let ids: Vec<Array> = self
            .recent
            .iter()
            .map(|token| match token {
                Recent::Known(id) => Ok(Array::from_slice(&[*id], &[1])),
                Recent::Sampled(id) => id.as_dtype(Dtype::Uint32),
            })
            .collect::<Result<_, _>>()?;
        Ok(ops::concatenate(&ids, 0)?.expand_dims(0)?)
    }
}

/// Row `r` of `[R, V]` as `[1, V]`.
fn row(x: &Array, r: usize) -> Result<Array, LmError> {
    if x.dim(0) == 1 {
        return Ok(x.clone());
    }
    ffi::slice(x, &[r as i32, 0], &[r as i32 + 1, x.dim(1)])
}

/// Element `r` of `[R]` as `[1]`.
fn element(x: &Array, r: usize) -> Result<Array, LmError> {
    ffi::slice(x, &[r as i32], &[r as i32 + 1])
}

/// In f32, whatever the model's type.
fn log_softmax(logits: &Array) -> Result<Array, LmError> {
    let logits = logits.as_dtype(Dtype::Float32)?;
    Ok(ops::subtract(&logits, logits.logsumexp_axis(-1, true)?)?)
}

/// Top-p, min-p and top-k on the log-probabilities, then a draw at the temperature (mlx-lm's order). `[1, V] -> [1]`
fn draw_row(mut logprobs: Array, params: &SamplingParams, index: u32) -> Result<Array, LmError> {
    let drop_below = |logprobs: &Array, threshold: &Array| -> Result<Array, LmError> {
        Ok(ops::select(ops::lt(logprobs, threshold)?, Array::from_f32(f32::NEG_INFINITY), logprobs)?)
    };
    if params.top_p < 1.0 {
        let threshold = top_p_threshold(&logprobs, params.top_p)?;
        logprobs = drop_below(&logprobs, &threshold)?;
    }
    if params.min_p > 0.0 {
        let threshold = ops::add(logprobs.max_axis(-1, true)?, Array::from_f32(params.min_p.ln()))?;
        logprobs = drop_below(&logprobs, &threshold)?;
    }
    let vocab_size = logprobs.dim(1);
    if params.top_k > 0 && (params.top_k as i64) < i64::from(vocab_size) {
        let k = params.top_k as i32;
        let sorted = ops::sort_axis(&logprobs, -1)?;
        let threshold = ffi::slice(&sorted, &[0, vocab_size - k], &[1, vocab_size - k + 1])?;
        logprobs = drop_below(&logprobs, &threshold)?;
    }
    let scaled = ops::multiply(logprobs, Array::from_f32(1.0 / params.temperature))?;
    let key = random::key(draw_key(params.seed, index))?;
    Ok(random::categorical(scaled, -1, None, &key)?)
}

/// The log-probability of the least likely token that still belongs to the nucleus of mass `top_p`. `[1, 1]`
fn top_p_threshold(logprobs: &Array, top_p: f32) -> Result<Array, LmError> {
    let sorted = ops::sort_axis(logprobs, -1)?;
    let probabilities = sorted.exp()?;
    let above = ops::cumsum(&probabilities, -1, true, false)?;
    let first = |x: &Array| ffi::slice(x, &[0, 0], &[1, 1]);
    let total = ops::add(first(&above)?, first(&probabilities)?)?;
    let outside = ops::ge(&above, ops::multiply(total, Array::from_f32(top_p))?)?;
    let dropped = outside.as_dtype(Dtype::Int32)?.sum_axis(-1, true)?;
    Ok(sorted.take_along_axis(dropped, -1)?)
}

/// The key of a draw: SplitMix64's finaliser (Steele et al. 2014) over seed and token index, so neighbouring indices are unrelated.
fn draw_key(seed: u64, index: u32) -> u64 {
    let mut z = seed.wrapping_add((u64::from(index) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Probabilities {
    /// Of the tokens `ids` `[R]` under `logprobs` `[R, V]`, with the `n` best of each row.
    fn of(logprobs: &Array, ids: &Array, n: u32) -> Result<Self, LmError> {
        let chosen = logprobs.take_along_axis(ids.expand_dims(-1)?, -1)?.squeeze_axes(&[-1])?;
        let n = (n as i32).min(logprobs.dim(1));
        if n == 0 {
            return Ok(Self { chosen, top: None });
        }
        let negative = logprobs.negative()?;
        let rows = logprobs.dim(0);
        let best = match n < logprobs.dim(1) {
            true => ffi::slice(&ops::argpartition_axis(&negative, n - 1, -1)?, &[0, 0], &[rows, n])?,
            false => ops::argsort_axis(&negative, -1)?,
        };
        let order = ops::argsort_axis(negative.take_along_axis(&best, -1)?, -1)?;
        let ids = best.take_along_axis(order, -1)?;
        let values = logprobs.take_along_axis(&ids, -1)?;
        Ok(Self { chosen, top: Some((ids, values)) })
    }

    fn arrays(&self) -> impl Iterator<Item = &Array> {
        [&self.chosen].into_iter().chain(self.top.iter().flat_map(|(ids, values)| [ids, values]))
    }

    /// Evaluates, and gives each row's log-probability with its alternatives.
    fn read(&self) -> Result<Vec<(f32, Alternatives)>, LmError> {
        let chosen = to_vec::<f32>(&self.chosen)?;
        let Some((ids, values)) = &self.top else {
            return Ok(chosen.into_iter().map(|logprob| (logprob, Vec::new())).collect());
        };
        let n = ids.dim(1) as usize;
        let pairs: Vec<(u32, f32)> = to_vec::<u32>(&ids.as_dtype(Dtype::Uint32)?)?.into_iter().zip(to_vec::<f32>(values)?).collect();
        Ok(chosen.into_iter().zip(pairs.chunks(n)).map(|(logprob, top)| (logprob, top.to_vec())).collect())
    }
}

impl Sampled {
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        [&self.ids].into_iter().chain(self.probabilities.iter().flat_map(Probabilities::arrays))
    }

    /// Evaluates: each sequence's token.
    pub fn read(&self) -> Result<Vec<(SequenceId, TokenOut)>, LmError> {
        let ids = to_vec::<u32>(&self.ids.as_dtype(Dtype::Uint32)?)?;
        let mut probabilities = match &self.probabilities {
            Some(probabilities) => probabilities.read()?.into_iter().map(Some).collect(),
            None => vec![None; ids.len()],
        };
        let tokens = ids.into_iter().zip(&self.wanted).zip(&mut probabilities).map(|((id, wanted), probability)| {
            match (wanted, probability.take()) {
                (Some(n), Some((logprob, mut top))) => {
                    top.truncate(*n as usize);
                    TokenOut { id, logprob: Some(logprob), top }
                }
                _ => TokenOut { id, logprob: None, top: Vec::new() },
            }
        });
        Ok(self.sequences.iter().copied().zip(tokens).collect())
    }
}

/// Log-probabilities of a part of a prompt, still lazy.
#[derive(Debug)]
pub struct PromptProbabilities {
    tokens: Vec<u32>,
    first_known: bool,
    n: u32,
    probabilities: Option<Probabilities>,
}

impl PromptProbabilities {
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.probabilities.iter().flat_map(Probabilities::arrays)
    }

    /// Evaluates: the part's tokens.
    pub fn read(&self) -> Result<Vec<TokenOut>, LmError> {
        let known = self.probabilities.as_ref().map(Probabilities::read).transpose()?.unwrap_or_default();
        let mut known = known.into_iter();
        let token = |(i, id): (usize, &u32)| match if i == 0 && !self.first_known { None } else { known.next() } {
            Some((logprob, mut top)) => {
                top.truncate(self.n as usize);
                TokenOut { id: *id, logprob: Some(logprob), top }
            }
            None => TokenOut { id: *id, logprob: None, top: Vec::new() },
        };
        Ok(self.tokens.iter().enumerate().map(token).collect())
    }
}

fn to_vec<T: mlx_rs::ArrayElement + Clone>(array: &Array) -> Result<Vec<T>, LmError> {
    array.eval()?;
    array.to_vec_exact::<T>().map_err(|error| LmError::Mlx(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB: u32 = 50;

    fn logits(rows: u32) -> Array {
        let values: Vec<f32> = (0..rows * VOCAB).map(|i| ((i * 7919) % 101) as f32 / 25.0).collect();
        Array::from_slice(&values, &[rows as i32, VOCAB as i32])
    }

    fn params(change: impl FnOnce(&mut SamplingParams)) -> SamplingParams {
        let mut params = SamplingParams { temperature: 1.0, ..Default::default() };
        change(&mut params);
        params
    }

    /// The token drawn for row `r` of `rows`, with the other rows sampled at the same time.
    fn draw(rows: u32, r: u32, params: &SamplingParams, index: u32) -> u32 {
        let mut sampler = Sampler::default();
        let draws: Vec<_> =
            (0..rows).map(|row| Draw { sequence: SequenceId(row.into()), index: if row == r { index } else { row } }).collect();
        for draw in &draws {
            let own = draw.sequence == SequenceId(r.into());
            let params = if own { params.clone() } else { SamplingParams { temperature: 0.3, seed: 9, ..Default::default() } };
            sampler.admit(draw.sequence, params, VOCAB).expect("admitted");
        }
        sampler.sample(&logits(rows), &draws).expect("sampled").read().expect("read")[r as usize].1.id
    }

    #[test]
    fn a_draw_depends_on_seed_and_index_only() {
        let params = params(|p| p.seed = 5);
        let alone: Vec<u32> = (0..20).map(|index| draw(1, 0, &params, index)).collect();
        let among: Vec<u32> = (0..20).map(|index| draw(7, 0, &params, index)).collect();
        assert_eq!(alone, among);
        assert!(alone.iter().any(|id| *id != alone[0]), "draws vary with the index");
        let other: Vec<u32> = (0..20).map(|index| draw(1, 0, &SamplingParams { seed: 6, ..params.clone() }, index)).collect();
        assert_ne!(alone, other);
    }

    #[test]
    fn filters_keep_only_what_they_say() {
        let best = draw(1, 0, &params(|p| p.temperature = 0.0), 0);
        let sorted = {
            let mut pairs: Vec<(u32, f32)> = (0..VOCAB).map(|i| (i, ((i * 7919) % 101) as f32 / 25.0)).collect();
            pairs.sort_by(|a, b| b.1.total_cmp(&a.1));
            pairs
        };
        assert_eq!(best, sorted[0].0);
        for index in 0..30 {
            assert_eq!(draw(1, 0, &params(|p| p.top_k = 1), index), best);
            assert_eq!(draw(1, 0, &params(|p| p.top_p = 0.001), index), best);
            assert_eq!(draw(1, 0, &params(|p| p.min_p = 1.0), index), best);
            let third = draw(1, 0, &params(|p| p.top_k = 3), index);
            assert!(sorted[..3].iter().any(|(id, _)| *id == third));
        }
    }

    #[test]
    fn bias_and_penalties_move_the_choice() {
        let best = draw(1, 0, &params(|p| p.temperature = 0.0), 0);
        let banned = params(|p| {
            p.temperature = 0.0;
            p.logit_bias = vec![(best, -100.0)];
        });
        assert_ne!(draw(1, 0, &banned, 0), best);
        for change in [
            |p: &mut SamplingParams| p.repetition_penalty = 50.0,
            |p: &mut SamplingParams| p.presence_penalty = 2.0,
            |p: &mut SamplingParams| p.frequency_penalty = 2.0,
        ] {
            let mut sampler = Sampler::default();
            let sequence = SequenceId(1);
            sampler
                .admit(
                    sequence,
                    params(|p| {
                        p.temperature = 0.0;
                        change(p);
                    }),
                    VOCAB,
                )
                .expect("admitted");
            let mut next = |index| sampler.sample(&logits(1), &[Draw { sequence, index }]).expect("sampled").read().expect("read")[0].1.id;
            assert_eq!(next(0), best);
            assert_ne!(next(1), best, "a token that was just generated is less likely");
        }
    }

    #[test]
    fn logprobs_are_those_of_a_log_softmax() {
        let mut sampler = Sampler::default();
        let sequence = SequenceId(1);
        sampler
            .admit(
                sequence,
                params(|p| {
                    p.temperature = 0.0;
                    p.logprobs = Some(2);
                    p.prompt_logprobs = Some(0)
                }),
                VOCAB,
            )
            .expect("admitted");
        let token = sampler.sample(&logits(1), &[Draw { sequence, index: 0 }]).expect("sampled").read().expect("read").remove(0).1;
        let values: Vec<f64> = (0..VOCAB).map(|i| f64::from((i * 7919) % 101) / 25.0).collect();
        let total = values.iter().map(|value| value.exp()).sum::<f64>().ln();
        assert!((f64::from(token.logprob.expect("wanted")) - (values[token.id as usize] - total)).abs() < 1e-4);
        assert_eq!(token.top.len(), 2);
        assert_eq!(token.top[0].0, token.id);
        let first = sampler.prompt(sequence, &[3, 4], &logits(2)).expect("scored").read().expect("read");
        assert_eq!((first[0].logprob, first.len()), (None, 2));
        assert!((f64::from(first[1].logprob.expect("known")) - (values[4] - total)).abs() < 1e-4);
        let second = sampler.prompt(sequence, &[5], &logits(1)).expect("scored").read().expect("read");
        assert!(second[0].logprob.is_some(), "the part before it said how likely it is");
    }
}
