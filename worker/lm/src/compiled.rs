//! Decode steps as compiled pieces: everything between two caches is one function, traced once for all layers of a shape.
//!
//! Weights are inputs, so layers share a function. Caches stay outside: a compiled function copies what it is given, and caches are large.

use crate::{
    blocks::{After, Before, Heads, Norm},
    error::LmError,
    linear::{Embedding, Linear, Parameters},
};
use mlx_rs::{Array, error::Exception, transforms::compile::compile};
use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

/// Steps with more rows than this run uncompiled: each number of rows is traced anew, and wide steps are bound by the kernels anyway.
pub const ROWS_MAX: i32 = 64;

type Function = Box<dyn FnMut(&[Array]) -> Result<Vec<Array>, Exception>>;

/// A function with the weights it is called with.
struct Piece {
    function: Rc<RefCell<Function>>,
    /// Room for the activations, then the weights.
    inputs: RefCell<Vec<Array>>,
    activations: usize,
}

impl Piece {
    fn call<const N: usize>(&self, activations: [&Array; N]) -> Result<Vec<Array>, LmError> {
        debug_assert_eq!(N, self.activations);
        let mut inputs = self.inputs.borrow_mut();
        for (slot, activation) in inputs.iter_mut().zip(activations) {
            *slot = activation.clone();
        }
        Ok((self.function.borrow_mut())(&inputs)?)
    }
}

/// The pieces of a shard, in the order of the computation.
pub struct Pieces {
    entry: Piece,
    /// Between one layer's cache and the next one's.
    between: Vec<Piece>,
    exit: Piece,
}

/// What stands before the first layer and after the last one.
#[derive(Clone)]
pub struct Ends {
    /// On the first stage.
    pub embedding: Option<Embedding>,
    /// On the last stage.
    pub head: Option<(Norm, Head)>,
}

/// Hidden states to logits.
#[derive(Debug, Clone)]
pub enum Head {
    Tied(Embedding),
    Linear(Linear),
}

impl Head {
    /// `[.., D] -> [.., V]`
    pub fn forward(&self, x: &Array) -> Result<Array, LmError> {
        match self {
            Head::Tied(embedding) => embedding.as_linear(x),
            Head::Linear(linear) => linear.forward(x),
        }
    }
}

impl Parameters for Head {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        match self {
            Head::Tied(embedding) => embedding.each(visit),
            Head::Linear(linear) => linear.each(visit),
        }
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        match self {
            Head::Tied(embedding) => embedding.each_mut(visit),
            Head::Linear(linear) => linear.each_mut(visit),
        }
    }
}

impl Pieces {
    /// Nothing is traced yet: that happens at the first call for each number of rows.
    pub fn new(layers: &[crate::blocks::Layer], ends: &Ends) -> Option<Self> {
        let (first, last) = (layers.first()?, layers.last()?);
        let mut functions: BTreeMap<String, Rc<RefCell<Function>>> = BTreeMap::new();
        let between = layers.windows(2).map(|pair| {
            let (after, before) = (&pair[0].after, &pair[1].before);
            let signature = format!("{} {}", after.signature(), before.signature());
            let function = functions.entry(signature).or_insert_with(|| shared(between(after.clone(), before.clone())));
            piece(function, 3, &[after, before])
        });
        let between = between.collect();
        let entry = match &ends.embedding {
            Some(embedding) => piece(&shared(embed(embedding.clone(), first.before.clone())), 2, &[embedding, &first.before]),
            None => piece(&shared(enter(first.before.clone())), 2, &[&first.before]),
        };
        let exit = match &ends.head {
            Some((norm, head)) => piece(&shared(finish(last.after.clone(), norm.clone(), head.clone())), 2, &[&last.after, norm, head]),
            None => piece(&shared(leave(last.after.clone())), 2, &[&last.after]),
        };
        Some(Self { entry, between, exit })
    }

    /// Runs a decode step: `input` are token ids `[B, 1]` on the first stage, hidden states `[B, 1, D]` on others. Gives logits `[B, 1, V]`
    /// on the last stage, hidden states on others. `attend(layer, heads)` runs a layer's attention over its caches.
    pub fn run(
        &self,
        input: &Array,
        offsets: &Array,
        mut attend: impl FnMut(usize, &Heads) -> Result<Array, LmError>,
    ) -> Result<Array, LmError> {
        let (mut x, heads) = split_entry(self.entry.call([input, offsets])?, input)?;
        let mut attended = attend(0, &heads)?;
        for (i, piece) in self.between.iter().enumerate() {
            let (next, heads) = split_entry(piece.call([&attended, &x, offsets])?, &x)?;
            x = next;
            attended = attend(i + 1, &heads)?;
        }
        self.exit.call([&attended, &x])?.pop().ok_or_else(|| LmError::Mlx("a compiled piece gave nothing".into()))
    }
}

fn shared(function: Function) -> Rc<RefCell<Function>> {
    Rc::new(RefCell::new(function))
}

fn piece(function: &Rc<RefCell<Function>>, activations: usize, weights: &[&dyn Parameters]) -> Piece {
    let mut inputs = vec![Array::from_int(0); activations];
    weights.iter().for_each(|part| part.each(&mut |array| inputs.push(array.clone())));
    Piece { function: Rc::clone(function), inputs: RefCell::new(inputs), activations }
}

/// `[x, queries, keys, values]`; an entry without embedding leaves `x` out, since it is its input.
fn split_entry(mut outputs: Vec<Array>, input: &Array) -> Result<(Array, Heads), LmError> {
    let x = if outputs.len() == 4 { outputs.remove(0) } else { input.clone() };
    match <[Array; 3]>::try_from(outputs) {
        Ok([queries, keys, values]) => Ok((x, Heads { queries, keys, values })),
        Err(outputs) => Err(LmError::Mlx(format!("a compiled piece gave {} arrays", outputs.len()))),
    }
}

/// A copy of `block` whose arrays are the next ones of `inputs`.
fn with_inputs<T: Parameters + Clone>(block: &T, inputs: &mut std::slice::Iter<Array>) -> T {
    let mut traced = block.clone();
    traced.each_mut(&mut |array| {
        if let Some(input) = inputs.next() {
            *array = input.clone();
        }
    });
    traced
}

fn compiled(mut body: impl FnMut(&[Array]) -> Result<Vec<Array>, LmError> + 'static) -> Function {
    let traced = move |inputs: &[Array]| body(inputs).map_err(|error| Exception::custom(error.to_string()));
    Box::new(compile(traced, false))
}

fn heads_of(x: Option<Array>, heads: Heads) -> Vec<Array> {
    x.into_iter().chain([heads.queries, heads.keys, heads.values]).collect()
}

fn embed(embedding: Embedding, before: Before) -> Function {
    compiled(move |inputs| {
        let (ids, offsets, mut weights) = (&inputs[0], &inputs[1], inputs[2..].iter());
        let (embedding, before) = (with_inputs(&embedding, &mut weights), with_inputs(&before, &mut weights));
        let x = embedding.forward(ids)?;
        let heads = before.forward(&x, offsets)?;
        Ok(heads_of(Some(x), heads))
    })
}

fn enter(before: Before) -> Function {
    compiled(move |inputs| {
        let before = with_inputs(&before, &mut inputs[2..].iter());
        Ok(heads_of(None, before.forward(&inputs[0], &inputs[1])?))
    })
}

fn between(after: After, before: Before) -> Function {
    compiled(move |inputs| {
        let (attended, x, offsets, mut weights) = (&inputs[0], &inputs[1], &inputs[2], inputs[3..].iter());
        let (after, before) = (with_inputs(&after, &mut weights), with_inputs(&before, &mut weights));
        let x = after.forward(attended, x)?;
        let heads = before.forward(&x, offsets)?;
        Ok(heads_of(Some(x), heads))
    })
}

fn leave(after: After) -> Function {
    compiled(move |inputs| {
        let after = with_inputs(&after, &mut inputs[2..].iter());
        Ok(vec![after.forward(&inputs[0], &inputs[1])?])
    })
}

fn finish(after: After, norm: Norm, head: Head) -> Function {
    compiled(move |inputs| {
        let mut weights = inputs[2..].iter();
        let (after, norm, head) = (with_inputs(&after, &mut weights), with_inputs(&norm, &mut weights), with_inputs(&head, &mut weights));
        let x = after.forward(&inputs[0], &inputs[1])?;
        Ok(vec![head.forward(&norm.forward(&x)?)?])
    })
}
