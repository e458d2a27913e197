//! Limits on what a chat template may cost. Templates come with downloaded models, so they are programs that we did not write.
//!
//! minijinja counts instructions ("fuel"), but one instruction can build any amount: `s ~ s` doubles a string forty times in
//! two hundred instructions. So the compiled program is rewritten: whatever made a value is followed by a call that weighs it,
//! and raw text goes through the formatter, which counts it too. Lists are refused when they are deep or when their parts,
//! counted as often as they occur, are many; with that no later comparison, printing or dropping can blow up or recurse far.

use std::time::{Duration, Instant};

use minijinja::machinery::{Instruction, Instructions};
use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};

/// Instructions one rendering may execute; a long conversation with many tools takes well below one million.
pub(super) const FUEL: u64 = 10_000_000;
/// Longest text a template may hold in one value or put out.
pub(super) const MAX_TEXT_BYTES: usize = 8 << 20;
/// Wall-clock time one rendering may take.
pub(super) const TIME_LIMIT: Duration = Duration::from_secs(2);
const MAX_BUILT_BYTES: usize = 1 << 30;
/// Output counts once for every macro or block that hands it on.
const MAX_WRITTEN_BYTES: usize = 8 * MAX_TEXT_BYTES;
const MAX_WEIGHT: usize = 32 << 20;
const MAX_DEPTH: usize = 200;
const NESTED_NAMESPACE: &str = "a namespace inside another value";
const NODE_WEIGHT: usize = 64;

const CHARGE: &str = "__charge";
const CONCAT: &str = "__concat";
const NO_NAMESPACE: &str = "__no_namespace";

/// Why a rendering was ended by us and not by a mistake in the template; travels as the source of minijinja's error.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum Halt {
    /// The template called `raise_exception`.
    #[error("{0}")]
    Raised(String),
    /// A limit of this module was reached.
    #[error("{0}")]
    Budget(&'static str),
}

impl From<Halt> for Error {
    fn from(halt: Halt) -> Self {
        Error::new(ErrorKind::InvalidOperation, halt.to_string()).with_source(halt)
    }
}

/// What one rendering has used so far; lives in the template engine's state.
struct Spent {
    bytes: usize,
    written: usize,
    started: Instant,
}

/// Counts `bytes` of newly built text.
///
/// # Errors
/// When it, or the sum of all so far, or the time since the first call is above the limit.
pub(super) fn charge(state: &mut State, bytes: usize) -> Result<(), Error> {
    if bytes > MAX_TEXT_BYTES {
        return Err(Halt::Budget("a text of more than 8 MiB").into());
    }
    let spent = spent(state);
    spent.bytes = spent.bytes.saturating_add(bytes);
    if spent.bytes > MAX_BUILT_BYTES {
        return Err(Halt::Budget("more than 1 GiB of text built").into());
    }
    if spent.started.elapsed() > TIME_LIMIT {
        return Err(Halt::Budget("more than 2 seconds").into());
    }
    Ok(())
}

/// Counts `bytes` of output, of the template or of one of its macros.
///
/// # Errors
/// As [`charge`].
pub(super) fn charge_output(state: &mut State, bytes: usize) -> Result<(), Error> {
    charge(state, bytes)?;
    let spent = spent(state);
    spent.written = spent.written.saturating_add(bytes);
    if spent.written > MAX_WRITTEN_BYTES {
        return Err(Halt::Budget("more than 8 MiB of output").into());
    }
    Ok(())
}

fn spent<'a>(state: &'a mut State) -> &'a mut Spent {
    state.get_or_insert_extension_with(|| Spent { bytes: 0, written: 0, started: Instant::now() })
}

/// Registers the functions that rewritten programs call.
pub(super) fn install(env: &mut minijinja::Environment<'static>) {
    env.set_fuel(Some(FUEL));
    env.add_function(CHARGE, |state: &mut State, value: Value| -> Result<Value, Error> {
        match value.as_str() {
            Some(text) => charge(state, text.len())?,
            None => {
                charge(state, 0)?;
                weigh(&value)?;
            }
        }
        Ok(value)
    });
    env.add_function(NO_NAMESPACE, |value: Value| -> Result<Value, Error> {
        if is_namespace(&value) { Err(Halt::Budget(NESTED_NAMESPACE).into()) } else { Ok(value) }
    });
    env.add_function(CONCAT, |state: &mut State, left: Value, right: Value| -> Result<Value, Error> {
        let mut text = BoundedText::default();
        text.push(&left)?;
        text.push(&right)?;
        charge(state, text.text.len())?;
        Ok(text.text.into())
    });
}

/// A text that refuses to grow over [`MAX_TEXT_BYTES`], also in the middle of printing one value.
#[derive(Default)]
pub(super) struct BoundedText {
    /// What was pushed.
    pub(super) text: String,
}

impl BoundedText {
    /// Appends what `{{ value }}` prints.
    pub(super) fn push(&mut self, value: &Value) -> Result<(), Error> {
        if let Some(text) = value.as_str() {
            return self.push_str(text);
        }
        use std::fmt::Write;
        let printed = match super::json::as_float(value) {
            Some(float) => self.write_str(&super::json::python_float(float)),
            None => write!(self, "{value}"),
        };
        printed.map_err(|_| Halt::Budget("a text of more than 8 MiB").into())
    }

    /// Appends `text`.
    pub(super) fn push_str(&mut self, text: &str) -> Result<(), Error> {
        use std::fmt::Write;
        self.write_str(text).map_err(|_| Halt::Budget("a text of more than 8 MiB").into())
    }
}

impl std::fmt::Write for BoundedText {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        if self.text.len() + text.len() > MAX_TEXT_BYTES {
            return Err(std::fmt::Error);
        }
        self.text.push_str(text);
        Ok(())
    }
}

/// Refuses values whose parts, counted as often as they occur, are too many or nested too deep.
///
/// # Errors
/// [`Halt::Budget`]; also for a namespace inside another value, the one way to make a value that contains itself.
pub(super) fn weigh(value: &Value) -> Result<(), Error> {
    let mut left = MAX_WEIGHT;
    weigh_part(value, 0, &mut left).map_err(Error::from)
}

fn weigh_part(value: &Value, depth: usize, left: &mut usize) -> Result<(), Halt> {
    let bytes = value.as_str().map_or(0, str::len) + NODE_WEIGHT;
    *left = left.checked_sub(bytes).ok_or(Halt::Budget("a list with too many parts"))?;
    let Some(object) = value.as_object() else { return Ok(()) };
    if depth > MAX_DEPTH {
        return Err(Halt::Budget("lists nested too deep"));
    }
    if depth > 0 && is_namespace(value) {
        return Err(Halt::Budget(NESTED_NAMESPACE));
    }
    match value.kind() {
        ValueKind::Map => {
            for (key, part) in object.try_iter_pairs().into_iter().flatten() {
                weigh_part(&key, depth + 1, left)?;
                weigh_part(&part, depth + 1, left)?;
            }
        }
        // An iterable without a length may be one that can be walked only once.
        ValueKind::Seq | ValueKind::Iterable if object.enumerator_len().is_some() => {
            for part in object.try_iter().into_iter().flatten() {
                weigh_part(&part, depth + 1, left)?;
            }
        }
        _ => {}
    }
    Ok(())
}

fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}

/// The same program with every value-building instruction followed by a charge for what it built.
pub(super) fn metered<'source>(program: &Instructions<'source>) -> Instructions<'source> {
    let old: Vec<_> = (0..).map_while(|at| program.get(at)).collect();
    let mut starts = Vec::with_capacity(old.len() + 1);
    let mut length = 0u32;
    for instruction in &old {
        starts.push(length);
        length += expand(instruction).len() as u32;
    }
    starts.push(length);

    let mut new = Instructions::new(program.name(), program.source());
    for (at, instruction) in old.iter().enumerate() {
        for mut part in expand(instruction) {
            if let Some(target) = jump_target(&mut part) {
                *target = starts.get(*target as usize).copied().unwrap_or(length);
            }
            match (program.get_span(at as u32), program.get_line(at as u32)) {
                (Some(span), _) => new.add_with_span(part, span),
                (None, Some(line)) => new.add_with_line(part, line.min(u16::MAX.into()) as u16),
                (None, None) => new.add(part),
            };
        }
    }
    new
}

fn expand<'source>(instruction: &Instruction<'source>) -> Vec<Instruction<'source>> {
    use Instruction as I;
    let charge = I::CallFunction(CHARGE, Some(1));
    match instruction {
        // "Safe" so that `{% autoescape %}` leaves the template's own text alone, as it does for raw text.
        I::EmitRaw(text) => vec![I::LoadConst(Value::from_safe_string((*text).to_owned())), I::Emit],
        I::StringConcat => vec![I::CallFunction(CONCAT, Some(2))],
        // The stack holds the value and, above it, the namespace it goes into.
        I::SetAttr(_) => vec![I::Swap, I::CallFunction(NO_NAMESPACE, Some(1)), I::Swap, instruction.clone()],
        I::Add
        | I::Mul
        | I::Slice
        | I::BuildList(_)
        | I::BuildTuple(_)
        | I::BuildMap(_)
        | I::ApplyFilter(..)
        | I::CallFunction(..)
        | I::CallMethod(..)
        | I::CallObject(_)
        | I::EndCapture => vec![instruction.clone(), charge],
        _ => vec![instruction.clone()],
    }
}

fn jump_target<'a>(instruction: &'a mut Instruction<'_>) -> Option<&'a mut u32> {
    use Instruction as I;
    match instruction {
        I::Iterate(target)
        | I::Jump(target)
        | I::JumpIfFalse(target)
        | I::JumpIfFalseOrPop(target)
        | I::JumpIfTrueOrPop(target)
        | I::BuildMacro(_, target, _) => Some(target),
        _ => None,
    }
}
