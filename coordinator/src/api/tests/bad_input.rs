//! Requests that are wrong: each gets its status, and an error object that says what, where and what to do.

use super::fake::{CONTEXT, Fake, VOCAB, request, send, text_of};
use axum::{body::Body, http::header};
use mlx_cluster_common::request::FinishReason;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const PLAIN: &str = "/v1/completions";

fn fake() -> Fake {
    Fake::saying("x", FinishReason::Length)
}

/// Sends `{base fields + field}` and returns status, param, code and message.
async fn refused(fake: &Fake, path: &str, base: Value, field: &str, value: Value) -> (u16, String, String, String) {
    let mut body = base;
    body[field] = value;
    let (status, body) = fake.post(path, body).await;
    let error = &body["error"];
    let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
    assert_eq!(error["type"], "invalid_request_error", "{body}");
    (status, text("param"), text("code"), text("message"))
}

#[tokio::test]
async fn values_out_of_range_are_named() {
    let fake = fake();
    let cases = [
        ("max_tokens", vec![json!(-1), json!(1e18), json!("5"), json!(1.5), json!([])]),
        ("max_completion_tokens", vec![json!(-1), json!(true)]),
        ("temperature", vec![json!(-1), json!(1e308), json!("hot"), json!(101)]),
        ("top_p", vec![json!(0), json!(1.1), json!(-0.5)]),
        ("top_k", vec![json!(-5), json!(0.5), json!("40")]),
        ("min_p", vec![json!(2), json!(-0.1)]),
        ("repetition_penalty", vec![json!(0), json!(-1)]),
        ("presence_penalty", vec![json!(2.5)]),
        ("frequency_penalty", vec![json!(-2.5)]),
        ("n", vec![json!(1_000_000), json!(0), json!("2")]),
        ("seed", vec![json!(u64::MAX), json!(1e30), json!("x"), json!(0.5)]),
        ("stream", vec![json!("yes"), json!(1)]),
        ("ignore_eos", vec![json!(1)]),
        ("user", vec![json!(1)]),
        ("model", vec![json!(1)]),
    ];
    for (field, values) in cases {
        for value in values {
            for (path, base) in [(PLAIN, json!({"prompt": "a"})), (CHAT, json!({"messages": [{"role": "user", "content": "a"}]}))] {
                let (status, param, code, message) = refused(&fake, path, base, field, value.clone()).await;
                assert_eq!((status, param.as_str()), (400, field), "{value}: {message}");
                assert!(["invalid_value", "invalid_type"].contains(&code.as_str()), "{code}");
            }
        }
    }
    let (status, param, _, message) =
        refused(&fake, CHAT, json!({"messages": [{"role": "user", "content": "a"}]}), "max_tokens", json!(0)).await;
    assert_eq!(
        (status, param.as_str(), message.as_str()),
        (400, "max_tokens", "`max_tokens` must be a whole number from 1 to 2147483647, not 0")
    );
}

#[tokio::test]
async fn lists_and_objects_are_checked_inside() {
    let fake = fake();
    let cases = [
        ("stop", json!([""]), "stop[0]"),
        ("stop", json!(vec!["x"; 17]), "stop"),
        ("stop", json!("x".repeat(257)), "stop[0]"),
        ("stop", json!(["a", 1]), "stop[1]"),
        ("stop", json!(7), "stop"),
        ("stop_token_ids", json!([1, VOCAB]), "stop_token_ids[1]"),
        ("stop_token_ids", json!([1, "a"]), "stop_token_ids[1]"),
        ("logit_bias", json!({"300": 1}), "logit_bias"),
        ("logit_bias", json!({"-1": 1}), "logit_bias"),
        ("logit_bias", json!({"1": 1e9}), "logit_bias"),
        ("logit_bias", json!({"1": "x"}), "logit_bias.1"),
        ("logit_bias", json!([1]), "logit_bias"),
        ("logprobs", json!(21), "logprobs"),
        ("logprobs", json!(true), "logprobs"),
        ("max_tokens", json!(0), "max_tokens"),
        ("stream_options", json!({"include_usage": true}), "stream_options"),
        ("echo", json!("yes"), "echo"),
    ];
    for (field, value, wanted) in cases {
        let (status, param, _, message) = refused(&fake, PLAIN, json!({"prompt": "a"}), field, value.clone()).await;
        assert_eq!((status, param.as_str()), (400, wanted), "{field} {value}: {message}");
    }
    let (_, _, _, message) = refused(&fake, PLAIN, json!({"prompt": "a"}), "logit_bias", json!({"300": 1})).await;
    assert_eq!(message, "`logit_bias` must be for a token id from 0 to 299, not 300");
}

#[tokio::test]
async fn what_is_not_supported_is_named_and_not_ignored() {
    let fake = fake();
    let plain = [
        ("suffix", json!("end")),
        ("best_of", json!(3)),
        ("temprature", json!(1)),
        ("guided_json", json!({})),
        ("response_format", json!({"type": "json_object"})),
        ("store", json!(true)),
        ("service_tier", json!("flex")),
        ("messages", json!([])),
        ("min_tokens", json!(3)),
        ("xtc_probability", json!(0.5)),
    ];
    for (field, value) in plain {
        let (status, param, code, _) = refused(&fake, PLAIN, json!({"prompt": "a"}), field, value).await;
        assert_eq!((status, param.as_str(), code.as_str()), (400, field, "not_supported"));
    }
    let chat = [
        ("reasoning_effort", json!("low"), "reasoning_effort"),
        ("tool_choice", json!("required"), "tool_choice"),
        ("tool_choice", json!({"type": "function", "function": {"name": "f"}}), "tool_choice"),
        ("response_format", json!({"type": "json_schema", "json_schema": {}}), "response_format"),
        ("functions", json!([]), "functions"),
        ("echo", json!(true), "echo"),
        ("chat_template", json!("{{ 1 }}"), "chat_template"),
        ("chat_template_kwargs", json!({"chat_template": "x"}), "chat_template_kwargs.chat_template"),
        ("chat_template_kwargs", json!({"messages": []}), "chat_template_kwargs.messages"),
        ("chat_template_kwargs", json!({"unheard_of": 1}), "chat_template_kwargs.unheard_of"),
        ("modalities", json!(["audio"]), "modalities"),
        ("prompt", json!("a"), "prompt"),
    ];
    for (field, value, wanted) in chat {
        let base = json!({"messages": [{"role": "user", "content": "a"}]});
        let (status, param, code, _) = refused(&fake, CHAT, base, field, value).await;
        assert_eq!((status, param.as_str(), code.as_str()), (400, wanted, "not_supported"));
    }
    let (_, _, _, message) = refused(&fake, PLAIN, json!({"prompt": "a"}), "best_of", json!(3)).await;
    assert_eq!(message, "`best_of` is not supported with the value 3 (only 1, 1.0); remove it from the request");
}

#[tokio::test]
async fn prompts_are_checked() {
    let fake = fake();
    let cases = [
        (json!(""), "prompt"),
        (json!([]), "prompt"),
        (json!([[]]), "prompt"),
        (json!([1, VOCAB]), "prompt[1]"),
        (json!([1, -1]), "prompt[1]"),
        (json!([1, "a"]), "prompt[1]"),
        (json!(["a", 1]), "prompt[1]"),
        (json!([[1], [2, 4_294_967_296_u64]]), "prompt[1][1]"),
        (json!([true]), "prompt[0]"),
        (json!(7), "prompt"),
        (json!(vec!["a"; 129]), "prompt"),
        (Value::Null, "prompt"),
    ];
    for (value, wanted) in cases {
        let (status, param, _, message) = refused(&fake, PLAIN, json!({}), "prompt", value.clone()).await;
        assert_eq!((status, param.as_str()), (400, wanted), "{value}: {message}");
    }
    let (_, _, _, message) = refused(&fake, PLAIN, json!({}), "prompt", json!([1, VOCAB])).await;
    assert_eq!(message, "`prompt[1]` must be a token id from 0 to 299, not 300");
}

#[tokio::test]
async fn a_prompt_must_fit_the_context() {
    let fake = fake();
    let context = CONTEXT as usize;
    let message_for = async |chars: usize| refused(&fake, PLAIN, json!({}), "prompt", json!("a".repeat(chars))).await;
    let (status, _, code, message) = message_for(context + 5).await;
    assert_eq!((status, code.as_str()), (400, "context_length_exceeded"));
    assert_eq!(message, "the prompt has 205 tokens, and the context of this model holds 200; send a shorter one");
    assert_eq!(
        message_for(context).await.3,
        "the prompt has 200 tokens, and the context of this model holds 200: no room is left for an answer"
    );
    assert!(message_for(128 * context + 1).await.3.starts_with("the prompt has 25601 bytes, far more than the 200 tokens"));
    fake.ok(PLAIN, json!({"prompt": "a".repeat(context), "max_tokens": 0, "echo": true})).await;
    fake.ok(PLAIN, json!({"prompt": "a".repeat(context - 1)})).await;
}

#[tokio::test]
async fn messages_are_checked() {
    let fake = fake();
    let cases = [
        (json!([]), "messages"),
        (Value::Null, "messages"),
        (json!("hi"), "messages"),
        (json!([1]), "messages[0]"),
        (json!([{"content": "a"}]), "messages[0].role"),
        (json!([{"role": "wizard", "content": "a"}]), "messages[0].role"),
        (json!([{"role": 1, "content": "a"}]), "messages[0].role"),
        (json!([{"role": "user", "content": "a"}, {"role": "user", "content": null}]), "messages[1].content"),
        (json!([{"role": "user", "content": 7}]), "messages[0].content"),
        (json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]), "messages[0].content[1].type"),
        (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
        (json!([{"role": "user", "content": "a", "mood": "good"}]), "messages[0].mood"),
        (json!([{"role": "assistant"}]), "messages[0].content"),
        (json!([{"role": "assistant", "content": "a", "function_call": {}}]), "messages[0].function_call"),
        (json!([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]), "messages[0].tool_calls[0].function.name"),
        (json!([{"role": "user", "content": "forbidden"}]), "messages"),
        (json!([{"role": "user", "content": "a".repeat(1 << 20)}]), ""),
    ];
    for (value, wanted) in cases {
        let (status, param, _, message) = refused(&fake, CHAT, json!({}), "messages", value.clone()).await;
        assert_eq!((status, param.as_str()), (400, wanted), "{value}: {message}");
    }
    let (_, _, _, message) = refused(&fake, CHAT, json!({}), "messages", json!([{"role": "wizard", "content": "a"}])).await;
    assert_eq!(message, "`messages[0].role` must be one of system, developer, user, assistant, tool, not `wizard`");
    let (_, _, _, message) = refused(&fake, CHAT, json!({}), "messages", json!([{"role": "user", "content": "forbidden"}])).await;
    assert_eq!(message, "`messages`: the model's chat template refuses them: not that word");
}

#[tokio::test]
async fn tools_are_checked() {
    let fake = fake();
    let function = |function: Value| json!([{"type": "function", "function": function}]);
    let cases = [
        (json!({}), "tools"),
        (json!([{"type": "retrieval"}]), "tools[0].type"),
        (json!([{"type": "function"}]), "tools[0].function"),
        (function(json!({})), "tools[0].function.name"),
        (function(json!({"name": "a b"})), "tools[0].function.name"),
        (function(json!({"name": "a", "parameters": []})), "tools[0].function.parameters"),
        (function(json!({"name": "a", "strict": true})), "tools[0].function.strict"),
    ];
    for (value, wanted) in cases {
        let base = json!({"messages": [{"role": "user", "content": "a"}]});
        let (status, param, _, message) = refused(&fake, CHAT, base, "tools", value.clone()).await;
        assert_eq!((status, param.as_str()), (400, wanted), "{value}: {message}");
    }
    let base = || json!({"messages": [{"role": "user", "content": "a"}]});
    assert_eq!(refused(&fake, CHAT, base(), "top_logprobs", json!(21)).await.1, "top_logprobs");
    assert_eq!(refused(&fake, CHAT, base(), "top_logprobs", json!(2)).await.3, "`top_logprobs`: it needs `logprobs`: true");
}

async fn raw(fake: &Fake, content_type: Option<&str>, body: impl Into<Body>) -> (u16, String) {
    let mut builder = request("POST", PLAIN);
    if let Some(content_type) = content_type {
        builder = builder.header(header::CONTENT_TYPE, content_type);
    }
    let (status, text) = text_of(send(fake.router(), builder.body(body.into()).expect("a request")).await).await;
    let body: Value = serde_json::from_str(&text).expect("JSON");
    (status, body["error"]["code"].as_str().unwrap_or("none").to_owned())
}

#[tokio::test]
async fn bodies_are_checked() {
    let fake = fake();
    let json = Some("application/json");
    let good = r#"{"prompt": "a"}"#;
    assert_eq!(raw(&fake, json, good).await, (200, "none".into()));
    assert_eq!(raw(&fake, Some("Application/JSON; charset=utf-8"), good).await, (200, "none".into()));
    assert_eq!(raw(&fake, None, good).await, (200, "none".into()));
    assert_eq!(raw(&fake, Some("text/plain"), good).await, (415, "unsupported_content_type".into()));
    assert_eq!(raw(&fake, Some("application/x-www-form-urlencoded"), "prompt=a").await, (415, "unsupported_content_type".into()));
    assert_eq!(raw(&fake, json, "{\"prompt\": }").await, (400, "invalid_json".into()));
    assert_eq!(raw(&fake, json, "").await, (400, "invalid_json".into()));
    assert_eq!(raw(&fake, json, "[]").await, (400, "invalid_type".into()));
    assert_eq!(raw(&fake, json, &b"{\"prompt\": \"\xff\"}"[..]).await, (400, "invalid_utf8".into()));
    assert_eq!(raw(&fake, json, "{\"prompt\": ".to_owned() + &"[".repeat(65)).await, (400, "json_too_deep".into()));
    assert_eq!(raw(&fake, json, r#"{"prompt": "a", "prompt": "b"}"#).await, (400, "invalid_json".into()));
    assert_eq!(raw(&fake, json, r#"{"prompt": "\ud800"}"#).await, (400, "invalid_json".into()));
    assert_eq!(raw(&fake, json, r#"{"prompt": "\u0000e\u0301\u0301"}"#).await, (200, "none".into()));
}

#[tokio::test]
async fn paths_and_methods_are_checked() {
    let fake = fake();
    for path in ["/", "/v1", "//v1/models", "/v1/%2e%2e/health", "/v1/chat/completions/x", "/v1/embeddings"] {
        let (status, text) = fake.get(path).await;
        let body: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!((status, &body["error"]["code"]), (404, &json!("not_found")), "{path}");
    }
    for (method, path, allow) in [("GET", CHAT, "POST"), ("DELETE", "/health", "GET,HEAD"), ("OPTIONS", PLAIN, "POST")] {
        let response = send(fake.router(), request(method, path).body(Body::empty()).expect("a request")).await;
        assert_eq!(response.headers()[header::ALLOW], allow);
        assert!(!response.headers().contains_key("access-control-allow-origin"));
        let (status, text) = text_of(response).await;
        assert_eq!((status, text.contains("method_not_allowed")), (405, true), "{text}");
    }
}

#[tokio::test]
async fn foreign_names_and_pages_are_refused() {
    let fake = fake();
    let status = async |name: &str, value: &str| {
        let builder = axum::http::Request::builder().uri("/health").header(name, value);
        let builder = if name == "host" { builder } else { builder.header("host", "localhost") };
        text_of(send(fake.router(), builder.body(Body::empty()).expect("a request")).await).await
    };
    assert_eq!(status("host", "127.0.0.1:1").await.0, 200);
    let (code, text) = status("host", "evil.example").await;
    assert_eq!((code, text.contains("wrong_host")), (421, true));
    let (code, text) = status("origin", "https://evil.example").await;
    assert_eq!((code, text.contains("foreign_origin")), (403, true));
}

#[tokio::test]
async fn other_models_are_not_found() {
    let fake = fake();
    for name in ["org/tiny", "tiny", "/models/tiny", "./tiny/", "default_model"] {
        fake.ok(PLAIN, json!({"model": name, "prompt": "a"})).await;
    }
    for name in ["other", "other/tiny", "", "gpt-4"] {
        let (status, body) = fake.post(PLAIN, json!({"model": name, "prompt": "a"})).await;
        assert_eq!((status, &body["error"]["code"], &body["error"]["param"]), (404, &json!("model_not_found"), &json!("model")));
        assert!(body["error"]["message"].as_str().expect("a text").ends_with("is not served here; ask for `org/tiny`"));
    }
}
