//! The minijinja environment in which every chat template runs, and one run of one template in it.

use std::fmt::Write;
use std::sync::OnceLock;

use minijinja::machinery::{self, CompiledTemplate, TemplateConfig};
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, UndefinedBehavior, Value};

use super::TemplateError;
use super::meter::{self, BoundedText, Halt};

const NAME: &str = "chat_template";

/// Compiles `source` and throws the result away.
///
/// # Errors
/// What rendering would report about the text itself.
pub(super) fn check(source: &str) -> Result<(), TemplateError> {
    compile(source).map(drop).map_err(|error| convert(&error))
}

/// Renders `source` with the variables `context`.
///
/// # Errors
/// See [`super::ChatTemplate::render`].
pub(super) fn run(source: &str, context: Value) -> Result<String, TemplateError> {
    let compiled = compile(source).map_err(|error| convert(&error))?;
    let program = meter::metered(&compiled.instructions);
    let blocks = compiled.blocks.iter().map(|(name, block)| (*name, meter::metered(block))).collect();
    let mut text = String::new();
    let mut output = machinery::make_string_output(&mut text);
    let done = machinery::eval(environment(), &program, context, &blocks, &mut output, AutoEscape::None);
    done.map(drop).map_err(|error| convert(&error))?;
    if text.len() > meter::MAX_TEXT_BYTES {
        return Err(TemplateError::Budget { limit: "more than 8 MiB of output" });
    }
    Ok(text)
}

fn compile(source: &str) -> Result<CompiledTemplate<'_>, Error> {
    let config =
        TemplateConfig { syntax_config: environment().syntax().clone(), default_auto_escape: std::sync::Arc::new(|_| AutoEscape::None) };
    CompiledTemplate::new(NAME, source, &config)
}

fn environment<'a>() -> &'a Environment<'a> {
    static ENVIRONMENT: OnceLock<Environment<'static>> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let mut env = Environment::new();
        // The whitespace rules of Hugging Face; the default of Jinja is neither.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.unwrap_or_default());
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_formatter(write_value);
        env.add_function("raise_exception", |message: String| -> Result<Value, Error> { Err(Halt::Raised(message).into()) });
        env.add_function("strftime_now", strftime_now);
        super::python::install(&mut env);
        meter::install(&mut env);
        env
    })
}

fn write_value(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let mut printed = BoundedText::default();
    let text = match value.as_str() {
        Some(text) => text,
        None => {
            meter::weigh(value)?;
            printed.push(value)?;
            &printed.text
        }
    };
    meter::charge_output(state, text.len())?;
    if *state.auto_escape() != AutoEscape::None {
        return minijinja::escape_formatter(out, state, value);
    }
    out.write_str(text).map_err(Error::from)
}

/// The local time in Python's `strftime` notation; `SOURCE_DATE_EPOCH` replaces the clock, for output that can be compared.
fn strftime_now(format: String) -> Result<String, Error> {
    use chrono::TimeZone;
    let fixed = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse().ok());
    let now = fixed.and_then(|seconds| chrono::Local.timestamp_opt(seconds, 0).single()).unwrap_or_else(chrono::Local::now);
    let mut text = String::new();
    match write!(text, "{}", now.format(&format)) {
        Ok(()) => Ok(text),
        Err(_) => Err(Error::new(ErrorKind::InvalidOperation, format!("{format:?} is not a date format"))),
    }
}

fn convert(error: &Error) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        match inner.downcast_ref::<Halt>() {
            Some(Halt::Raised(message)) => return TemplateError::Raised { message: message.clone() },
            Some(Halt::Budget(limit)) => return TemplateError::Budget { limit },
            None => cause = inner.source(),
        }
    }
    let detail = error.detail().unwrap_or_default();
    let limit = match error.kind() {
        ErrorKind::OutOfFuel => Some("too many steps"),
        _ if detail.contains("recursion limit") => Some("blocks or calls nested too deep"),
        _ if detail.contains("range has too many") => Some("a range of more than 100000 numbers"),
        _ if detail.contains("is too large") => Some("a repetition that is too long"),
        _ => None,
    };
    match limit {
        Some(limit) => TemplateError::Budget { limit },
        None if error.kind() == ErrorKind::SyntaxError => TemplateError::Syntax { message: describe(error) },
        None => TemplateError::Failed { message: describe(error) },
    }
}

fn describe(error: &Error) -> String {
    let what = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}
