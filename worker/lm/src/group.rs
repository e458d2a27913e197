//! The tensor-parallel group of a stage: sums and gathers over its ranks.

use crate::{
    error::LmError,
    ffi::{self, DistributedGroup},
};
use mlx_cluster_common::{plan::Collective, tensor::TensorPlace};
use mlx_rs::{Array, ops};
use std::{
    cell::{Cell, OnceCell, RefCell},
    ffi::CStr,
    ops::Range,
    path::Path,
    rc::Rc,
};

/// MLX's ring reads the ranks' addresses from the file that this names, and its own rank from the second; whoever starts the process sets
/// both.
pub const HOSTFILE_VARIABLE: &str = "MLX_HOSTFILE";
pub const RANK_VARIABLE: &str = "MLX_RANK";

const RING: &CStr = c"ring";
const JACCL: &CStr = c"jaccl";

thread_local! {
    /// What collectives have to wait for; None outside of [`in_order`].
    static LAST: RefCell<Option<Option<Array>>> = const { RefCell::new(None) };
}

/// Runs what builds a graph whose collectives are all to be met in the order in which they are called.
///
/// Every rank has to run the same collectives in the same order. MLX orders what does not hang together by the shape of the graph, which
/// differs between ranks with unequal shares; so each collective is made to wait for the one before it. What is built inside can be a traced
/// function: it is a graph of its own.
pub fn in_order<T>(build: impl FnOnce() -> T) -> T {
    let outer = LAST.replace(Some(None));
    let built = build();
    LAST.replace(outer);
    built
}

/// `array`, but not before the collectives so far.
pub fn after_collectives(array: &Array) -> Result<Array, LmError> {
    match LAST.with_borrow(|last| last.clone().flatten()) {
        Some(last) => ffi::after(array, &last),
        None => Ok(array.clone()),
    }
}

/// Later collectives wait for this, inside of [`in_order`].
pub fn collectives_wait_for(array: &Array) {
    LAST.with_borrow_mut(|last| {
        if let Some(last) = last {
            *last = Some(array.clone());
        }
    });
}

/// The ranks of a stage. Blocks are built with it before it has formed; a collective before that is an error. Clones are the same group.
#[derive(Debug, Clone)]
pub struct Group(Rc<Inner>);

#[derive(Debug)]
struct Inner {
    place: TensorPlace,
    formed: OnceCell<DistributedGroup>,
    /// Gradients go through its collectives.
    trains: Cell<bool>,
}

impl Group {
    pub fn new(place: TensorPlace) -> Self {
        Self(Rc::new(Inner { place, formed: OnceCell::new(), trains: Cell::new(false) }))
    }

    /// Connects to the other ranks; `addresses` are where each listens, by rank. Waits for ever for a rank that does not come: the caller
    /// has to end the process when it takes too long. A process can form one group in its life.
    pub fn form(&self, collective: Collective, addresses: &[String]) -> Result<(), LmError> {
        if addresses.len() != self.size() {
            return Err(LmError::Group(format!("{} addresses for {} ranks", addresses.len(), self.size())));
        }
        let name = match collective {
            Collective::Jaccl => JACCL,
            Collective::Auto if ffi::has_collective(JACCL) && std::env::var_os("MLX_IBV_DEVICES").is_some() => JACCL,
            Collective::Auto | Collective::Ring => RING,
        };
        if name == RING {
            let path = std::env::var_os(HOSTFILE_VARIABLE).ok_or_else(|| LmError::Group(format!("{HOSTFILE_VARIABLE} is not set")))?;
            write_hostfile(Path::new(&path), addresses)?;
        }
        let group = ffi::form_group(name, self.size())?;
        self.0.formed.set(group).map_err(|_| LmError::Group("the group has formed before".into()))
    }

    /// From now on collectives are differentiated as what they are: functions of what every rank has. A rank's gradient is then that of the sum
    /// of all ranks' outcomes by its own copy of a parameter.
    ///
    /// MLX differentiates a sum as if the outcome counted once, which leaves to each block where gradients have to be added up again. This way
    /// the transpose of each collective is in one place, and blocks know nothing of it.
    pub fn train(&self) {
        self.0.trains.set(true);
    }

    pub fn place(&self) -> &TensorPlace {
        &self.0.place
    }

    pub fn rank(&self) -> u32 {
        self.0.place.rank
    }

    pub fn size(&self) -> usize {
        self.0.place.ranks()
    }

    /// The sum over all ranks, the same bits on each.
    pub fn all_sum(&self, array: &Array) -> Result<Array, LmError> {
        let group = self.formed()?;
        self.ordered(array, |array| ffi::all_sum(array, group))
    }

    /// A collective after those before it, through which gradients go as [`train`](Self::train) says.
    fn ordered(&self, array: &Array, collective: impl FnOnce(&Array) -> Result<Array, LmError>) -> Result<Array, LmError> {
        let made = collective(&after_collectives(array)?)?;
        let made = if self.0.trains.get() { self.sums_gradients(&made)? } else { made };
        collectives_wait_for(&made);
        Ok(made)
    }

    /// `array`, whose gradient is the sum of all ranks' gradients.
    fn sums_gradients(&self, array: &Array) -> Result<Array, LmError> {
        let group = self.clone();
        ffi::with_gradient(array, move |gradient| {
            let made = ffi::all_sum(&after_collectives(gradient)?, group.formed()?)?;
            collectives_wait_for(&made);
            Ok(made)
        })
    }

    /// What rank 0 has, on every rank: for numbers that the ranks could compute differently.
    pub fn of_first(&self, array: &Array) -> Result<Array, LmError> {
        let factor = Array::from_int(i32::from(self.rank() == 0)).as_dtype(array.dtype())?;
        self.all_sum(&ops::multiply(array, factor)?)
    }

    /// The parts of all ranks side by side along the last axis: `lengths[rank]` entries of each.
    pub fn all_gather_last(&self, array: &Array, lengths: &[i32]) -> Result<Array, LmError> {
        // MLX gathers equal shapes along the first axis.
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let own = array.dim(-1);
        let flat = array.reshape(&[-1, own])?;
        let padded = if own == longest { flat } else { ops::pad(&flat, &[(0, 0), (0, longest - own)], None, None)? };
        let rows = padded.dim(0);
        let group = self.formed()?;
        let all = self.ordered(&padded.expand_dims(0)?, |array| ffi::all_gather(array, group))?;
        let part = |(rank, length): (i32, &i32)| {
            ffi::slice(&all, &[rank, 0, 0], &[rank + 1, rows, *length])?.reshape(&[rows, *length]).map_err(LmError::from)
        };
        let parts = (0..).zip(lengths).map(part).collect::<Result<Vec<_>, _>>()?;
        let mut shape = array.shape().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = lengths.iter().sum();
        }
        Ok(ops::concatenate(&parts, -1)?.reshape(&shape)?)
    }

    fn formed(&self) -> Result<&DistributedGroup, LmError> {
        self.0.formed.get().ok_or_else(|| LmError::Group("the group has not formed yet".into()))
    }
}

/// A table or head whose rows are on the ranks of a group.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    group: Group,
    /// The rank's own rows.
    own: Range<i32>,
    /// Rows of each rank.
    lengths: Vec<i32>,
}

impl Vocabulary {
    pub fn new(group: Group, parts: &[Range<u32>]) -> Self {
        let own = parts.get(group.rank() as usize).map_or(0..0, |range| range.start as i32..range.end as i32);
        Self { group, own, lengths: parts.iter().map(|range| (range.end - range.start) as i32).collect() }
    }

    /// Rows of the whole table for token ids `[..]`: `rows` looks ids up in the rank's own.
    pub fn look_up(&self, ids: &Array, rows: impl FnOnce(&Array) -> Result<Array, LmError>) -> Result<Array, LmError> {
        let number = |value: i32| Array::from_int(value).as_dtype(ids.dtype());
        let inside = ops::logical_and(ops::ge(ids, number(self.own.start)?)?, ops::lt(ids, number(self.own.end)?)?)?;
        let own = ops::select(&inside, ops::subtract(ids, number(self.own.start)?)?, number(0)?)?;
        let found = rows(&own)?;
        let nothing = Array::from_f32(0.0).as_dtype(found.dtype())?;
        self.group.all_sum(&ops::select(inside.expand_dims(-1)?, &found, nothing)?)
    }

    /// Logits of all ranks side by side.
    pub fn gather(&self, logits: &Array) -> Result<Array, LmError> {
        self.group.all_gather_last(logits, &self.lengths)
    }
}

/// One list of addresses a rank, as MLX's ring reads it.
fn write_hostfile(path: &Path, addresses: &[String]) -> Result<(), LmError> {
    let quoted: Vec<_> = addresses.iter().map(|address| format!("[\"{}\"]", address.replace(['"', '\\'], ""))).collect();
    std::fs::write(path, format!("[{}]", quoted.join(",")))
        .map_err(|error| LmError::Group(format!("cannot write {}: {error}", path.display())))
}
