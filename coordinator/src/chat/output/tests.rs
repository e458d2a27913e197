//! Reasoning, answers and tool calls from text cut in every way.

use proptest::prelude::*;

use super::*;

const BOTH: OutputFormat = OutputFormat { reasoning: Some(ReasoningFormat::ThinkTags), tools: Some(ToolFormat::Json) };
const TOOLS: OutputFormat = OutputFormat { reasoning: None, tools: Some(ToolFormat::Json) };

/// What came out, neighbours of the same kind joined: r reasoning, t text, c call.
fn parse(format: OutputFormat, prompt: &str, pieces: &[&str]) -> Vec<(char, String)> {
    let mut parser = OutputParser::new(format, prompt);
    let mut events: Vec<OutputEvent> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
    events.extend(parser.finish());
    let mut joined: Vec<(char, String)> = Vec::new();
    for event in events {
        let (kind, text) = match event {
            OutputEvent::Reasoning(text) => ('r', text),
            OutputEvent::Text(text) => ('t', text),
            OutputEvent::ToolCall(call) => ('c', format!("{} {}", call.name, call.arguments)),
        };
        assert!(!text.is_empty());
        match joined.last_mut() {
            Some((last, so_far)) if *last == kind && kind != 'c' => so_far.push_str(&text),
            _ => joined.push((kind, text)),
        }
    }
    joined
}

fn whole(format: OutputFormat, prompt: &str, text: &str) -> Vec<(char, String)> {
    let parsed = parse(format, prompt, &[text]);
    let chars: Vec<String> = text.chars().map(String::from).collect();
    let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
    assert_eq!(parse(format, prompt, &chars), parsed, "{text:?}");
    parsed
}

fn expect(parts: &[(char, &str)]) -> Vec<(char, String)> {
    parts.iter().map(|(kind, text)| (*kind, (*text).to_owned())).collect()
}

#[test]
fn reasoning_answer_and_calls_are_told_apart() {
    let text = "<think>\nI should add.\n</think>\n\nLet me see.\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>\n\
                <tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let parts = [('r', "I should add."), ('t', "Let me see."), ('c', "add {\"a\": 1}"), ('c', "now {}")];
    assert_eq!(whole(BOTH, "<|im_start|>assistant\n", text), expect(&parts));
}

#[test]
fn the_prompt_may_have_opened_the_reasoning() {
    let prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n";
    assert_eq!(whole(BOTH, prompt, "hm\n</think>\n\nhello"), expect(&[('r', "hm"), ('t', "hello")]));
    assert_eq!(whole(BOTH, prompt, "hm, cut off"), expect(&[('r', "hm, cut off")]));
    let closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n";
    assert_eq!(whole(BOTH, closed, "hello"), expect(&[('t', "hello")]));
    let users_words = "user: what is <think>?\nassistant:";
    assert_eq!(whole(BOTH, users_words, "a tag"), expect(&[('t', "a tag")]));
}

#[test]
fn marks_in_the_middle_of_an_answer_are_text() {
    assert_eq!(whole(BOTH, "", "The <think> tag, </think>."), expect(&[('t', "The <think> tag, </think>.")]));
    assert_eq!(whole(BOTH, "", "a < b <t"), expect(&[('t', "a < b <t")]));
    let text = "<think>x</think><tool_call>{\"name\":\"f\"}</tool_call>";
    assert_eq!(whole(OutputFormat::default(), "<think>", text), expect(&[('t', text)]));
}

#[test]
fn malformed_calls_come_out_as_text() {
    for text in [
        "a <tool_call>\n{\"name\": }\n</tool_call> b",
        "Write <tool_call> and </tool_call> around it.",
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": \"unclosed}}</tool_call>",
        "<tool_call>\n{\"name\": \"f\", \"arg",
        "<tool_call>",
        "\n<tool_call>[]</tool_call>\n",
    ] {
        assert_eq!(whole(TOOLS, "", text), expect(&[('t', text)]), "{text}");
    }
}

#[test]
fn a_good_call_after_a_malformed_one_is_found() {
    let text = "Use <tool_call>, like <tool_call>{\"name\":\"f\"}</tool_call>";
    assert_eq!(whole(TOOLS, "", text), expect(&[('t', "Use <tool_call>, like"), ('c', "f {}")]));
    let text = "<tool_call>{bad}</tool_call>\n<tool_call>{\"name\":\"f\"}</tool_call>\n ok ";
    assert_eq!(whole(TOOLS, "", text), expect(&[('t', "<tool_call>{bad}</tool_call>"), ('c', "f {}"), ('t', "ok ")]));
}

#[test]
fn the_closing_mark_may_be_inside_an_argument_or_missing_at_the_end() {
    let text = r#"<tool_call>{"name":"say","arguments":{"x":"a </tool_call> \" b"}}</tool_call>"#;
    assert_eq!(whole(TOOLS, "", text), expect(&[('c', r#"say {"x":"a </tool_call> \" b"}"#)]));
    let text = "<tool_call>\n{\"name\":\"f\",\"arguments\":{}}\n";
    assert_eq!(whole(TOOLS, "", text), expect(&[('c', "f {}")]));
}

#[test]
fn text_is_not_held_back_without_need() {
    let mut parser = OutputParser::new(BOTH, "");
    assert_eq!(parser.push("Hello"), [OutputEvent::Text("Hello".to_owned())]);
    assert_eq!(parser.push(" <b>"), [OutputEvent::Text(" <b>".to_owned())]);
    assert_eq!(parser.push("<tool_call>not json"), [OutputEvent::Text("<tool_call>not json".to_owned())]);
}

fn fragments() -> impl Strategy<Value = String> {
    let fragment = prop::sample::select(vec![
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "{\"name\":\"f\"}",
        "{\"name\":\"g\",\"arguments\":{\"a\":\"b\"}}",
        "{",
        "\"",
        "\\",
        " ",
        "\n",
        "x",
        "é",
        "<",
        "</t",
    ]);
    prop::collection::vec(fragment, 0..12).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn cutting_makes_no_difference(text in fragments(), opened in any::<bool>(), cut in any::<prop::sample::Index>()) {
        let prompt = if opened { "<think>\n" } else { "" };
        let parsed = whole(BOTH, prompt, &text);
        let mut at = cut.index(text.len() + 1);
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        prop_assert_eq!(parse(BOTH, prompt, &[&text[..at], &text[at..]]), parsed);
    }

    #[test]
    fn without_marks_nothing_is_lost(text in "[a-z<>/ \n]{0,40}") {
        let expected = if text.is_empty() { vec![] } else { vec![('t', text.clone())] };
        prop_assert_eq!(whole(BOTH, "", &text), expected);
    }
}
