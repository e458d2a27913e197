//! Chats, whole and in pieces, with reasoning and tool calls.

use super::fake::{CONTEXT, EOS, Fake, Step, golden, ids, served};
use mlx_cluster_common::request::FinishReason;
use serde_json::{Value, json};
use std::sync::Arc;

const PATH: &str = "/v1/chat/completions";
const THOUGHT: &str = "<think>\nhm\n</think>\n\nHi!";
const CALL: &str = "Sure.\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>";

fn hello() -> Value {
    json!([{"role": "user", "content": "hello"}])
}

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}])
}

#[tokio::test]
async fn a_whole_answer() {
    let fake = Fake::saying(THOUGHT, FinishReason::Stop);
    let body = fake.ok(PATH, json!({"model": "tiny", "messages": hello()})).await;
    let expected = r#"{"id":"chatcmpl-0","object":"chat.completion","created":0,"model":"org/tiny","choices":[{"index":0,"message":{"role":"assistant","content":"Hi!","refusal":null,"reasoning_content":"hm"},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":8,"completion_tokens":25,"total_tokens":33,"prompt_tokens_details":{"cached_tokens":0}}}"#;
    assert_eq!(golden(&body.to_string()), expected);
    let asked = fake.asked().await;
    assert_eq!(asked.prompt, ids("<|user|>hello<|end|><|assistant|>"));
    assert_eq!((asked.params.max_tokens, asked.params.stop_tokens), (CONTEXT - 8, vec![EOS]));
}

#[tokio::test]
async fn a_streamed_answer() {
    let fake = Fake::saying("Hi", FinishReason::Stop);
    let body = json!({"messages": hello(), "stream": true, "stream_options": {"include_usage": true}});
    let (status, text) = fake.post_text(PATH, body).await;
    let head = r#"data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":0,"model":"org/tiny","choices":["#;
    let piece = |delta: &str, finish: &str| {
        format!("{head}{{\"index\":0,\"delta\":{{{delta}}},\"logprobs\":null,\"finish_reason\":{finish}}}],\"usage\":null}}\n\n")
    };
    let usage = r#"],"usage":{"prompt_tokens":8,"completion_tokens":3,"total_tokens":11,"prompt_tokens_details":{"cached_tokens":0}}}"#;
    let expected = [
        piece(r#""role":"assistant","content":"""#, "null"),
        piece(r#""content":"H""#, "null"),
        piece(r#""content":"i""#, "null"),
        piece("", "\"stop\""),
        format!("{head}{usage}\n\n"),
        "data: [DONE]\n\n".into(),
    ];
    assert_eq!((status, golden(&text)), (200, expected.concat()));
}

/// The deltas of a stream, and its last finish reason.
async fn deltas(fake: &Fake, body: Value) -> (Vec<Value>, Value) {
    let (status, text) = fake.post_text(PATH, body).await;
    assert_eq!(status, 200, "{text}");
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let chunks: Vec<Value> = text.split("data: ").filter_map(|data| serde_json::from_str(data).ok()).collect();
    let finish = chunks.last().expect("some")["choices"][0]["finish_reason"].clone();
    (chunks.iter().map(|chunk| chunk["choices"][0]["delta"].clone()).collect(), finish)
}

fn joined(deltas: &[Value], key: &str) -> String {
    deltas.iter().filter_map(|delta| delta[key].as_str()).collect()
}

#[tokio::test]
async fn reasoning_is_streamed_apart() {
    let fake = Fake::saying(THOUGHT, FinishReason::Stop);
    let (parts, finish) = deltas(&fake, json!({"messages": hello(), "stream": true})).await;
    assert_eq!((joined(&parts, "reasoning_content").as_str(), joined(&parts, "content").as_str()), ("hm", "Hi!"));
    assert_eq!(finish, "stop");
}

#[tokio::test]
async fn reasoning_that_the_prompt_opened_is_known_as_such() {
    let fake = Fake::saying("hm</think>Hi!", FinishReason::Stop);
    let body = json!({"messages": hello(), "chat_template_kwargs": {"enable_thinking": true}});
    let message = fake.ok(PATH, body).await["choices"][0]["message"].clone();
    assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("hm"), &json!("Hi!")));
    assert!(fake.asked().await.prompt.ends_with(&ids("<|assistant|><think>")));
}

#[tokio::test]
async fn tool_calls_are_taken_out_of_the_text() {
    let fake = Fake::saying(CALL, FinishReason::Stop);
    let choice = fake.ok(PATH, json!({"messages": hello(), "tools": tools()})).await["choices"][0].clone();
    let expected = r#"{"index":0,"message":{"role":"assistant","content":"Sure.","refusal":null,"tool_calls":[{"id":"call_0","type":"function","function":{"name":"add","arguments":"{\"a\": 1}"}}]},"logprobs":null,"finish_reason":"tool_calls"}"#;
    assert_eq!(golden(&choice.to_string()), expected);
    let prompt = fake.asked().await.prompt;
    assert!(prompt.starts_with(&ids("<|system|>{\"type\": \"function\", \"function\": {\"name\": \"add\"")));
}

#[tokio::test]
async fn tool_calls_are_streamed_with_their_index() {
    let twice = || vec![Step::Say(CALL), Step::Say(CALL), Step::Token(EOS), Step::Finish(FinishReason::Stop)];
    let fake = Fake::new(move |_| twice());
    let (parts, finish) = deltas(&fake, json!({"messages": hello(), "tools": tools(), "stream": true})).await;
    let calls: Vec<&Value> = parts.iter().filter_map(|delta| delta.get("tool_calls")).collect();
    assert_eq!(
        golden(&calls[1][0].to_string()),
        r#"{"id":"call_0","type":"function","function":{"name":"add","arguments":"{\"a\": 1}"},"index":1}"#
    );
    assert_eq!((calls.len(), finish), (2, json!("tool_calls")));
}

#[tokio::test]
async fn one_call_is_enough_when_calls_shall_not_be_parallel() {
    for stream in [false, true] {
        let fake = Fake::new(|_| vec![Step::Say(CALL), Step::Say(CALL), Step::Hang]);
        let body = json!({"messages": hello(), "tools": tools(), "parallel_tool_calls": false, "stream": stream});
        let (status, text) = fake.post_text(PATH, body).await;
        assert_eq!((status, text.matches("\"id\":\"call_").count()), (200, 1));
        assert!(text.contains(r#""finish_reason":"tool_calls""#), "{text}");
        assert_eq!(fake.cancelled().await, 0);
    }
}

#[tokio::test]
async fn without_tools_the_marks_are_text() {
    let fake = Fake::saying(CALL, FinishReason::Length);
    let body = json!({"messages": hello(), "tools": tools(), "tool_choice": "none"});
    let choice = fake.ok(PATH, body).await["choices"][0].clone();
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!(CALL), &json!("length")));
    assert_eq!(fake.asked().await.prompt, ids("<|user|>hello<|end|><|assistant|>"));
}

#[tokio::test]
async fn logprobs_have_bytes_and_alternatives() {
    let fake = Fake::saying("é", FinishReason::Stop);
    let body = json!({"messages": hello(), "logprobs": true, "top_logprobs": 2, "return_token_ids": true});
    let body = fake.ok(PATH, body).await;
    let choice = &body["choices"][0];
    let entries = choice["logprobs"]["content"].as_array().expect("a list");
    assert_eq!(entries.len(), 2);
    assert_eq!((&entries[0]["bytes"], &entries[0]["logprob"], &entries[1]["bytes"]), (&json!([0xc3]), &json!(-0.5), &json!([0xa9])));
    assert_eq!(entries[0]["top_logprobs"][1], json!({"token": "\u{fffd}", "logprob": -1.5, "bytes": [0xc4]}));
    assert_eq!(choice["token_ids"], json!([ids("é"), vec![EOS]].concat()));
    assert_eq!(body["prompt_token_ids"], json!(ids("<|user|>hello<|end|><|assistant|>")));
    let none = fake.ok(PATH, json!({"messages": hello(), "logprobs": true})).await;
    assert_eq!(none["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

#[tokio::test]
async fn several_answers_have_their_places() {
    let fake = Fake::new(|i| vec![Step::Say(["p", "q"][i]), Step::Token(EOS), Step::Finish(FinishReason::Stop)]);
    let body = fake.ok(PATH, json!({"messages": hello(), "n": 2})).await;
    let texts: Vec<&Value> = body["choices"].as_array().expect("a list").iter().map(|choice| &choice["message"]["content"]).collect();
    assert_eq!(texts, ["p", "q"]);
    assert_eq!((&body["usage"]["prompt_tokens"], &body["usage"]["completion_tokens"]), (&json!(8), &json!(4)));
}

#[tokio::test]
async fn a_stop_string_ends_the_answer() {
    let fake = Fake::new(|_| vec![Step::Say("one\ntwo"), Step::Hang]);
    let choice = fake.ok(PATH, json!({"messages": hello(), "stop": ["\n"]})).await["choices"][0].clone();
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!("one"), &json!("stop")));
    assert_eq!(fake.cancelled().await, 0);
}

#[tokio::test]
async fn messages_reach_the_template_in_one_form() {
    let fake = Fake::saying("x", FinishReason::Stop);
    let messages = json!([
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "assistant", "content": null, "refusal": null, "annotations": [], "audio": null, "reasoning_content": "hm",
         "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 7}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "8"},
    ]);
    fake.ok(PATH, json!({"messages": messages})).await;
    assert_eq!(fake.asked().await.prompt, ids("<|system|>be brief<|end|><|assistant|>7<|end|><|tool|>8<|end|><|assistant|>"));
}

#[tokio::test]
async fn a_model_without_template_takes_no_chats() {
    let fake = Fake::saying("x", FinishReason::Stop);
    fake.model.send_replace(Some(Arc::new(served(None))));
    let (status, body) = fake.post(PATH, json!({"messages": hello()})).await;
    assert_eq!((status, &body["error"]["message"]), (400, &json!("`messages`: org/tiny has no chat template; use /v1/completions")));
}

#[tokio::test]
async fn tools_need_a_template_that_knows_them() {
    let fake = Fake::saying("x", FinishReason::Stop);
    fake.model.send_replace(Some(Arc::new(served(Some("{{ messages[0].content }}")))));
    let (status, body) = fake.post(PATH, json!({"messages": hello(), "tools": tools()})).await;
    assert_eq!((status, &body["error"]["param"], &body["error"]["code"]), (400, &json!("tools"), &json!("not_supported")));
    fake.ok(PATH, json!({"messages": hello(), "tools": []})).await;
}
