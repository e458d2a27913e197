//! Decode steps as compiled pieces: everything between two caches is one function, traced once for all layers of a shape.
//!
//! Weights are inputs, so layers share a function. Caches of attention stay outside: a compiled function copies what it is given, and they
//! are large. A recurrent state is small, and its whole step is one compiled function more.

use crate::{
    blocks::{After, Before, Entry, Exit, Flow, Layer, Mix, Recurrence, with_arrays},
    cache::{Cache, RecurrentState},
    error::LmError,
    group::in_order,
    parameters::Parameters,
    served::{
        Adaptable,
        rows::{self, Rows},
    },
};
use mlx_rs::{Array, error::Exception, transforms::compile::compile};
use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

/// Steps with more rows than this run uncompiled: each number of rows is traced anew, and wide steps are bound by the kernels anyway.
pub const ROWS_MAX: i32 = 64;

type Function = Rc<RefCell<Box<dyn FnMut(&[Array]) -> Result<Vec<Array>, Exception>>>>;

/// What stands before the first layer and after the last one of a shard.
#[derive(Clone, Default)]
pub struct Ends {
    /// On the first stage.
    pub entry: Option<Entry>,
    /// On the last stage.
    pub exit: Option<Exit>,
}

/// The pieces of a shard, in the order of the computation.
pub struct Pieces {
    /// One more than there are caches.
    pieces: Vec<Piece>,
    /// For each cache: its layer, and what happens there, where that is compiled too.
    mixes: Vec<(usize, Option<CompiledMix>)>,
}

/// A function with the weights it is called with.
struct Piece {
    function: Function,
    /// Room for what comes in, then the weights, which stay from call to call.
    inputs: RefCell<Vec<Array>>,
    /// What it gives.
    gives: Counts,
}

/// How many arrays of each kind cross the border of a piece, besides the stream itself.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    /// Into every piece, where rows have adapters.
    slots: usize,
    layer_inputs: usize,
    /// Into a piece: what comes out of a cache. Out of it: what goes there.
    mixed: usize,
    beside: usize,
}

/// What is computed between two caches.
#[derive(Clone)]
enum Fragment {
    Entry(Box<Entry>),
    Before(Box<Before>),
    After(Box<After>),
    Exit(Box<Exit>),
}

/// What goes from piece to piece.
struct Stream {
    x: Array,
    layer_inputs: Option<Array>,
    flow: Flow,
}

impl Pieces {
    /// Nothing is traced yet: that happens at the first call for each number of rows. `takes_layer_inputs`: they come from the stage before.
    /// `has_adapters`: for steps with rows that have some, of those that are beside the matrices now.
    pub fn new(layers: &[Layer], ends: &Ends, takes_layer_inputs: bool, has_adapters: bool) -> Self {
        let slots = usize::from(has_adapters);
        let mut functions: BTreeMap<String, Function> = BTreeMap::new();
        let mut fragments: Vec<Fragment> = ends.entry.iter().map(|entry| Fragment::Entry(Box::new(entry.clone()))).collect();
        let (mut pieces, mut mixes) = (Vec::new(), Vec::new());
        let mut takes = Counts { slots, layer_inputs: usize::from(takes_layer_inputs), ..Counts::default() };
        for (number, layer) in layers.iter().enumerate() {
            fragments.push(Fragment::Before(Box::new(layer.before.clone())));
            if let Some(mix) = &layer.mix {
                let (takes_by_mix, _) = layer.before.arity();
                let piece = Piece::new(std::mem::take(&mut fragments), takes, &mut functions);
                takes = Counts {
                    slots,
                    layer_inputs: takes.layer_inputs.max(piece.gives.layer_inputs),
                    mixed: mix.outputs(),
                    beside: piece.gives.beside,
                };
                pieces.push(piece);
                mixes.push((number, CompiledMix::of(mix, &layer.before.signature(), takes_by_mix, has_adapters, &mut functions)));
            }
            fragments.push(Fragment::After(Box::new(layer.after.clone())));
        }
        fragments.extend(ends.exit.iter().map(|exit| Fragment::Exit(Box::new(exit.clone()))));
        pieces.push(Piece::new(fragments, takes, &mut functions));
        Self { pieces, mixes }
    }

    /// Runs a decode step: `input` are token ids `[B, 1]` on the first stage, hidden states `[B, 1, D]` on others. Gives logits `[B, 1, V]`
    /// on the last stage, hidden states on others, and the per-layer inputs. `mix(layer, flow, compiled)` runs a layer's mixer over its caches.
    pub fn run(
        &self,
        input: &Array,
        layer_inputs: Option<Array>,
        offsets: &Array,
        mut mix: impl FnMut(usize, &Flow, Option<&CompiledMix>) -> Result<Vec<Array>, LmError>,
    ) -> Result<(Array, Option<Array>), LmError> {
        let mut stream = Stream { x: input.clone(), layer_inputs, flow: Flow::default() };
        let rows = rows::current();
        let slots = rows.as_ref().map(Rows::slots);
        for (i, piece) in self.pieces.iter().enumerate() {
            stream = piece.call(stream, offsets, slots)?;
            if let Some((layer, compiled)) = self.mixes.get(i) {
                stream.flow.mixed = mix(*layer, &stream.flow, compiled.as_ref())?;
            }
        }
        Ok((stream.x, stream.layer_inputs))
    }
}

impl Piece {
    fn new(fragments: Vec<Fragment>, takes: Counts, functions: &mut BTreeMap<String, Function>) -> Self {
        let mut inputs = vec![Array::from_int(0); 2 + takes.slots + takes.layer_inputs + takes.mixed + takes.beside];
        fragments.iter().for_each(|fragment| fragment.each(&mut |array| inputs.push(array.clone())));
        let made = fragments.iter().any(|fragment| matches!(fragment, Fragment::Entry(entry) if entry.makes_layer_inputs()));
        let (mixed, beside) = match fragments.last() {
            Some(Fragment::Before(before)) => before.arity(),
            _ => (0, 0),
        };
        let signature: String = fragments.iter().map(|fragment| fragment.signature() + "; ").collect();
        let function = functions.entry(format!("{takes:?} {signature}")).or_insert_with(|| compiled(fragments, takes));
        let gives = Counts { slots: 0, layer_inputs: usize::from(made), mixed, beside };
        Self { function: Rc::clone(function), inputs: RefCell::new(inputs), gives }
    }

    fn call(&self, stream: Stream, offsets: &Array, slots: Option<&Array>) -> Result<Stream, LmError> {
        let Stream { x, layer_inputs, flow } = stream;
        let mut inputs = self.inputs.borrow_mut();
        let given = [x, offsets.clone()].into_iter().chain(slots.cloned()).chain(layer_inputs.clone()).chain(flow.mixed).chain(flow.beside);
        inputs.iter_mut().zip(given).for_each(|(slot, array)| *slot = array);
        let mut outputs = (self.function.borrow_mut())(&inputs)?.into_iter();
        let mut take = |n: usize| outputs.by_ref().take(n).collect::<Vec<_>>();
        let (mut x, mut made) = (take(1), take(self.gives.layer_inputs));
        let flow = Flow { mixed: take(self.gives.mixed), beside: take(self.gives.beside) };
        let x = x.pop().ok_or_else(|| LmError::Mlx("a compiled piece gave nothing".into()))?;
        Ok(Stream { x, layer_inputs: made.pop().or(layer_inputs), flow })
    }
}

impl Fragment {
    fn signature(&self) -> String {
        match self {
            // Each occurs once in a shard.
            Fragment::Entry(_) => "entry".into(),
            Fragment::Exit(_) => "exit".into(),
            Fragment::Before(before) => format!("before {}", before.signature()),
            Fragment::After(after) => format!("after {}", after.signature()),
        }
    }

    /// Moves the stream on; gives the per-layer inputs if it makes them.
    fn run(&self, stream: &mut Stream, offsets: &Array) -> Result<Option<Array>, LmError> {
        match self {
            Fragment::Entry(entry) => {
                let (x, layer_inputs) = entry.forward(&stream.x)?;
                stream.x = x;
                stream.layer_inputs.clone_from(&layer_inputs);
                return Ok(layer_inputs);
            }
            Fragment::Before(before) => stream.flow = before.forward(&stream.x, offsets)?,
            Fragment::After(after) => {
                let flow = std::mem::take(&mut stream.flow);
                stream.x = after.forward(&flow.mixed, &flow.beside, &stream.x, stream.layer_inputs.as_ref())?;
            }
            Fragment::Exit(exit) => stream.x = exit.forward(&stream.x)?,
        }
        Ok(None)
    }
}

/// The fragments one after the other, as a function of `[x, offsets, slots, layer inputs, mixed.., beside.., weights..]`.
fn compiled(fragments: Vec<Fragment>, takes: Counts) -> Function {
    function(move |inputs: &[Array]| {
        let mut inputs = inputs.iter();
        let mut next = || inputs.next().cloned().ok_or_else(|| LmError::Mlx("a compiled piece got too few arrays".into()));
        let (x, offsets) = (next()?, next()?);
        let mut take = |n: usize| (0..n).map(|_| next()).collect::<Result<Vec<_>, _>>();
        let slots = take(takes.slots)?.pop().map(|slots| Rows::new(&slots)).transpose()?;
        let layer_inputs = take(takes.layer_inputs)?.pop();
        let flow = Flow { mixed: take(takes.mixed)?, beside: take(takes.beside)? };
        let mut stream = Stream { x, layer_inputs, flow };
        let mut made = None;
        for fragment in &fragments {
            let mut traced = fragment.clone();
            replace(&mut traced, &mut next)?;
            made = rows::with(slots.clone(), || traced.run(&mut stream, &offsets))?.or(made);
        }
        Ok([stream.x].into_iter().chain(made).chain(stream.flow.mixed).chain(stream.flow.beside).collect())
    })
}

/// Puts the next arrays in the place of a block's own.
fn replace(block: &mut impl Parameters, next: &mut impl FnMut() -> Result<Array, LmError>) -> Result<(), LmError> {
    let mut missing = None;
    block.each_mut(&mut |array| match next() {
        Ok(input) => *array = input,
        Err(error) => missing = Some(error),
    });
    missing.map_or(Ok(()), Err)
}

fn function(mut body: impl FnMut(&[Array]) -> Result<Vec<Array>, LmError> + 'static) -> Function {
    let traced = move |inputs: &[Array]| in_order(|| body(inputs)).map_err(|error| Exception::custom(error.to_string()));
    Rc::new(RefCell::new(Box::new(compile(traced, false))))
}

/// A mixer at its cache, compiled where it is a recurrence.
pub enum CompiledMix {
    Step(Box<CompiledStep>),
    /// Each takes this many of the arrays.
    Parallel(Vec<(usize, CompiledMix)>),
    Uncompiled(Box<Mix>),
}

impl CompiledMix {
    /// None for attention, which is left to the layer.
    fn of(mix: &Mix, signature: &str, arity: usize, has_adapters: bool, functions: &mut BTreeMap<String, Function>) -> Option<Self> {
        match mix {
            Mix::Recurrent(recurrence) => {
                let step = CompiledStep::new((**recurrence).clone(), signature, arity, has_adapters, functions);
                Some(Self::Step(Box::new(step)))
            }
            Mix::Parallel(mixes) => {
                let part = |(i, (n, mix)): (usize, &(usize, Mix))| {
                    let compiled = Self::of(mix, &format!("part {i} of {signature}"), *n, has_adapters, functions);
                    (*n, compiled.unwrap_or_else(|| Self::Uncompiled(Box::new(mix.clone()))))
                };
                Some(Self::Parallel(mixes.iter().enumerate().map(part).collect()))
            }
            Mix::Attention(_) | Mix::Latent(_) => None,
        }
    }

    /// One token of one sequence (`B` and `L` are 1) over its cache: one array for each mixer.
    pub fn run(&self, rows: &[Array], cache: &mut Cache) -> Result<Vec<Array>, LmError> {
        match (self, cache) {
            (Self::Step(step), Cache::Recurrent(state)) => Ok(vec![step.run(rows, state)?]),
            (Self::Uncompiled(mix), cache) => mix.forward(rows, cache),
            (Self::Parallel(parts), Cache::Several(caches)) => {
                let (mut mixed, mut rest) = (Vec::new(), rows);
                for ((n, part), cache) in parts.iter().zip(caches) {
                    let (own, others) = rest.split_at(*n);
                    mixed.extend(part.run(own, cache)?);
                    rest = others;
                }
                Ok(mixed)
            }
            _ => Err(LmError::Mlx("a mixer met a cache of another kind".into())),
        }
    }
}

/// One token of one sequence through a recurrence.
pub struct CompiledStep {
    function: Function,
    recurrence: Recurrence,
    /// `[slots, rows.., state..]` come before them.
    weights: Vec<Array>,
}

impl CompiledStep {
    fn new(recurrence: Recurrence, signature: &str, arity: usize, has_adapters: bool, functions: &mut BTreeMap<String, Function>) -> Self {
        let mut weights = Vec::new();
        recurrence.each(&mut |array| weights.push(array.clone()));
        let key = format!("step {}", with_arrays(signature, &recurrence));
        let function = functions.entry(key).or_insert_with(|| compiled_step(recurrence.clone(), arity, has_adapters));
        Self { function: Rc::clone(function), recurrence, weights }
    }

    /// `rows` of one token (`B` and `L` are 1).
    fn run(&self, rows: &[Array], state: &mut RecurrentState) -> Result<Array, LmError> {
        if state.arrays.is_empty() {
            // The first token sets the state's types, which a compiled step keeps.
            return self.recurrence.forward(rows, state);
        }
        let slots = rows::current().map(|rows| rows.slots().clone());
        let inputs: Vec<Array> =
            slots.into_iter().chain(rows.iter().cloned()).chain(state.arrays.drain(..)).chain(self.weights.iter().cloned()).collect();
        let mut outputs = (self.function.borrow_mut())(&inputs)?;
        if outputs.is_empty() {
            return Err(LmError::Mlx("a compiled step gave nothing".into()));
        }
        state.arrays = outputs.split_off(1);
        Ok(outputs.swap_remove(0))
    }
}

/// A recurrence's step as a function of `[slots, rows.., state.., weights..]`.
fn compiled_step(recurrence: Recurrence, arity: usize, has_adapters: bool) -> Function {
    let mut n_weights = 0;
    recurrence.each(&mut |_| n_weights += 1);
    function(move |inputs: &[Array]| {
        let (slots, inputs) = inputs.split_at(usize::from(has_adapters).min(inputs.len()));
        let slots = slots.first().map(Rows::new).transpose()?;
        let (rows, rest) = inputs.split_at(arity.min(inputs.len()));
        let (state, weights) = rest.split_at(rest.len().saturating_sub(n_weights));
        let mut weights = weights.iter();
        let mut traced = recurrence.clone();
        replace(&mut traced, &mut || weights.next().cloned().ok_or_else(|| LmError::Mlx("a compiled step got too few arrays".into())))?;
        let (y, moved) = rows::with(slots, || traced.step(rows, state))?;
        Ok([y].into_iter().chain(moved).collect())
    })
}

impl Parameters for Fragment {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        match self {
            Fragment::Entry(entry) => entry.each(visit),
            Fragment::Before(before) => before.each(visit),
            Fragment::After(after) => after.each(visit),
            Fragment::Exit(exit) => exit.each(visit),
        }
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        match self {
            Fragment::Entry(entry) => entry.each_mut(visit),
            Fragment::Before(before) => before.each_mut(visit),
            Fragment::After(after) => after.each_mut(visit),
            Fragment::Exit(exit) => exit.each_mut(visit),
        }
    }

    fn each_matrix(&mut self, visit: &mut dyn FnMut(Adaptable<'_>)) {
        match self {
            Fragment::Entry(entry) => entry.each_matrix(visit),
            Fragment::Before(before) => before.each_matrix(visit),
            Fragment::After(after) => after.each_matrix(visit),
            Fragment::Exit(exit) => exit.each_matrix(visit),
        }
    }
}
