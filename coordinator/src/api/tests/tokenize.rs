//! Token ids without an answer.

use super::fake::{BOS, CONTEXT, EOS, Fake, ids, served};
use mlx_cluster_common::request::FinishReason;
use serde_json::{Value, json};
use std::sync::Arc;

const PATH: &str = "/tokenize";
const TEMPLATE: &str = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% for tool in tools or [] %}\
{{ tool.function.name }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}";

fn fake() -> Fake {
    let fake = Fake::saying("x", FinishReason::Length);
    fake.model.send_replace(Some(Arc::new(served(Some(TEMPLATE)))));
    fake
}

#[tokio::test]
async fn a_text_becomes_its_ids() {
    let body = fake().ok(PATH, json!({"model": "org/tiny", "prompt": "hé"})).await;
    assert_eq!(body, json!({"count": 3, "max_model_len": CONTEXT, "tokens": ids("hé"), "eos_token_id": EOS}));
    assert_eq!(fake().ok(PATH, json!({"prompt": ""})).await["tokens"], json!([]));
    let bos = fake().ok(PATH, json!({"prompt": "<|bos|>a", "add_special_tokens": false})).await;
    assert_eq!(bos["tokens"], json!([vec![BOS], ids("a")].concat()));
}

#[tokio::test]
async fn messages_are_rendered_with_and_without_the_start_of_an_answer() {
    let fake = fake();
    let tokens = async |body: Value| fake.ok(PATH, body).await["tokens"].clone();
    let messages = json!([{"role": "user", "content": "a"}]);
    assert_eq!(tokens(json!({"messages": messages})).await, json!(ids("<|user|>a<|end|><|assistant|>")));
    assert_eq!(tokens(json!({"messages": messages, "add_generation_prompt": false})).await, json!(ids("<|user|>a<|end|>")));
    let tools = json!([{"type": "function", "function": {"name": "look"}}]);
    assert_eq!(tokens(json!({"messages": messages, "tools": tools})).await, json!(ids("<|user|>a<|end|>look<|assistant|>")));
}

#[tokio::test]
async fn what_it_does_not_do_is_refused_by_name() {
    let fake = fake();
    let refused = async |body: Value| {
        let (status, body) = fake.post(PATH, body).await;
        assert_eq!(status, 400, "{body}");
        body["error"]["param"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!(refused(json!({})).await, "messages");
    assert_eq!(refused(json!({"prompt": 7})).await, "prompt");
    assert_eq!(refused(json!({"prompt": "a", "messages": []})).await, "messages");
    assert_eq!(refused(json!({"prompt": "a", "max_tokens": 1})).await, "max_tokens");
    assert_eq!(refused(json!({"prompt": "a", "return_token_strs": true})).await, "return_token_strs");
    assert_eq!(
        refused(json!({"messages": [{"role": "user", "content": "a"}], "continue_final_message": true})).await,
        "continue_final_message"
    );
    fake.model.send_replace(Some(Arc::new(served(None))));
    assert_eq!(refused(json!({"messages": [{"role": "user", "content": "a"}]})).await, "messages");
}
