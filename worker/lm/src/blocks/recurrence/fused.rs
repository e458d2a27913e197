//! Chains of elementwise operations that prefill runs as one kernel each: apart, they would spend their time on reading and writing memory.

use crate::error::LmError;
use mlx_rs::{Array, error::Exception, transforms::compile::compile};
use std::cell::RefCell;

type Compiled = Box<dyn FnMut(&[Array]) -> Result<Vec<Array>, Exception>>;

/// A function of a fixed number of arrays, traced once for all that have the same shapes and types.
pub(super) struct Fused(RefCell<Compiled>);

impl Fused {
    pub(super) fn new(body: fn(&[Array]) -> Result<Array, Exception>) -> Self {
        let traced = move |inputs: &[Array]| body(inputs).map(|output| vec![output]);
        Self(RefCell::new(Box::new(compile(traced, false))))
    }

    pub(super) fn call(&self, inputs: &[Array]) -> Result<Array, LmError> {
        let mut outputs = (self.0.borrow_mut())(inputs)?;
        outputs.pop().ok_or_else(|| LmError::Mlx("a fused function gave nothing".into()))
    }
}
