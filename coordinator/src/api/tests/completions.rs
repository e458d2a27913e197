//! Plain completions, whole and in pieces.

use super::fake::{BOS, CONTEXT, EOS, Fake, Step, golden, ids};
use mlx_cluster_common::request::FinishReason;
use serde_json::{Value, json};

const PATH: &str = "/v1/completions";

#[tokio::test]
async fn a_whole_answer() {
    let fake = Fake::saying(" world", FinishReason::Stop);
    let body = fake.ok(PATH, json!({"model": "org/tiny", "prompt": "hello"})).await;
    let expected = r#"{"id":"cmpl-0","object":"text_completion","created":0,"model":"org/tiny","choices":[{"index":0,"text":" world","logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12,"prompt_tokens_details":{"cached_tokens":0}}}"#;
    assert_eq!(golden(&body.to_string()), expected);
    let asked = fake.asked().await;
    assert_eq!(asked.prompt, ids("hello"));
    assert_eq!((asked.params.max_tokens, asked.params.temperature, asked.params.stop_tokens), (16, 1.0, vec![EOS]));
}

#[tokio::test]
async fn a_streamed_answer() {
    let fake = Fake::saying("hé", FinishReason::Length);
    let body = json!({"prompt": "a", "stream": true, "stream_options": {"include_usage": true}, "max_tokens": 3});
    let (status, text) = fake.post_text(PATH, body).await;
    let head = r#"data: {"id":"cmpl-0","object":"text_completion","created":0,"model":"org/tiny","choices":["#;
    let piece = |text: &str, finish: &str| {
        format!("{head}{{\"index\":0,\"text\":\"{text}\",\"logprobs\":null,\"finish_reason\":{finish}}}],\"usage\":null}}\n\n")
    };
    let usage = r#"],"usage":{"prompt_tokens":1,"completion_tokens":3,"total_tokens":4,"prompt_tokens_details":{"cached_tokens":0}}}"#;
    let expected =
        [piece("h", "null"), piece("é", "null"), piece("", "\"length\""), format!("{head}{usage}\n\n"), "data: [DONE]\n\n".into()];
    assert_eq!((status, golden(&text)), (200, expected.concat()));
}

#[tokio::test]
async fn prompt_logprobs_come_before_those_of_the_answer() {
    let fake = Fake::saying("xy", FinishReason::Stop);
    let body = json!({"model": "tiny", "prompt": ids("abc"), "max_tokens": 12, "temperature": 0, "logprobs": 1, "echo": true, "return_token_ids": true});
    let choice = fake.ok(PATH, body).await["choices"][0].clone();
    assert_eq!(choice["text"], "abcxy");
    assert_eq!(choice["token_ids"], json!([ids("xy"), vec![EOS]].concat()));
    assert_eq!(choice["prompt_token_ids"], json!(ids("abc")));
    assert_eq!(choice["logprobs"]["tokens"], json!(["a", "b", "c", "x", "y", "<|eos|>"]));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.5, -0.5, -0.5, -0.5, -0.5]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2, 3, 4, 5]));
    assert_eq!(choice["logprobs"]["top_logprobs"][0], Value::Null);
    assert_eq!(choice["logprobs"]["top_logprobs"][1], json!({"b": -0.5}));
    let params = fake.asked().await.params;
    assert_eq!((params.logprobs, params.prompt_logprobs, params.temperature), (Some(1), Some(1), 0.0));
}

#[tokio::test]
async fn only_the_prompt_is_read_when_nothing_shall_be_generated() {
    let fake = Fake::new(|_| vec![Step::Finish(FinishReason::Length)]);
    let body = json!({"prompt": "ab", "max_tokens": 0, "logprobs": 0, "echo": true});
    let body = fake.ok(PATH, body).await;
    let choice = &body["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("ab"), &json!("length")));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.5]));
    assert_eq!(body["usage"]["completion_tokens"], 0);
    assert_eq!(fake.asked().await.params.max_tokens, 0);
}

#[tokio::test]
async fn special_tokens_of_a_prompt_are_echoed() {
    let fake = Fake::saying("c", FinishReason::Length);
    let mut prompt = vec![BOS];
    prompt.extend(ids("ab"));
    let body = json!({"prompt": prompt, "max_tokens": 1, "logprobs": 0, "echo": true});
    let choice = fake.ok(PATH, body).await["choices"][0].clone();
    assert_eq!(choice["text"], "<|bos|>abc");
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 7, 8, 9]));
}

#[tokio::test]
async fn several_prompts_and_answers_have_their_places() {
    let fake = Fake::new(|i| vec![Step::Say(["p", "q", "r", "s"][i]), Step::Finish(FinishReason::Length)]);
    let body = json!({"prompt": ["ab", "c"], "n": 2, "max_tokens": 1, "seed": -1});
    let body = fake.ok(PATH, body).await;
    let texts: Vec<(u64, &str)> = body["choices"].as_array().expect("a list").iter().map(place_and_text).collect();
    assert_eq!(texts, [(0, "p"), (1, "q"), (2, "r"), (3, "s")]);
    assert_eq!((&body["usage"]["prompt_tokens"], &body["usage"]["completion_tokens"]), (&json!(3), &json!(4)));
    for (prompt, seed) in [("ab", u64::MAX), ("ab", 0), ("c", u64::MAX), ("c", 0)] {
        let asked = fake.asked().await;
        assert_eq!((asked.prompt, asked.params.seed), (ids(prompt), seed));
    }
}

#[tokio::test]
async fn lists_of_ids_are_several_prompts() {
    let fake = Fake::saying("x", FinishReason::Length);
    let body = fake.ok(PATH, json!({"prompt": [ids("ab"), ids("c")], "max_tokens": 1})).await;
    assert_eq!((&body["usage"]["prompt_tokens"], &body["choices"][1]["index"]), (&json!(3), &json!(1)));
    assert_eq!((fake.asked().await.prompt, fake.asked().await.prompt), (ids("ab"), ids("c")));
}

fn place_and_text(choice: &Value) -> (u64, &str) {
    (choice["index"].as_u64().expect("an index"), choice["text"].as_str().expect("a text"))
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_and_the_work() {
    let fake = Fake::new(|_| vec![Step::Say("one EN"), Step::Say("Dless"), Step::Hang]);
    let body = json!({"prompt": "a", "stop": "END", "logprobs": 0, "return_token_ids": true});
    let body = fake.ok(PATH, body).await;
    let choice = &body["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("one "), &json!("stop")));
    assert_eq!(choice["token_ids"], json!(ids("one ")));
    assert_eq!(choice["logprobs"]["tokens"], json!(["o", "n", "e", " "]));
    assert_eq!(body["usage"]["completion_tokens"], 7);
    assert_eq!(fake.cancelled().await, 0);
}

#[tokio::test]
async fn what_may_begin_a_stop_string_waits() {
    let fake = Fake::saying("aENbEN", FinishReason::Length);
    let body = json!({"prompt": "a", "stop": ["END", "\n"], "stream": true, "logprobs": 0});
    let (_, text) = fake.post_text(PATH, body).await;
    let chunks: Vec<Value> = text.split("data: ").filter_map(|data| serde_json::from_str(data).ok()).collect();
    let texts: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]["text"]).collect();
    assert_eq!(texts, ["a", "ENb", "EN"]);
    assert_eq!(chunks[1]["choices"][0]["logprobs"]["tokens"], json!(["E", "N", "b"]));
    assert_eq!(chunks[2]["choices"][0]["logprobs"]["text_offset"], json!([4, 5]));
}

#[tokio::test]
async fn parts_of_characters_are_shown_as_bytes() {
    let fake = Fake::saying("é", FinishReason::Length);
    let choice = fake.ok(PATH, json!({"prompt": "a", "logprobs": 0})).await["choices"][0].clone();
    assert_eq!(choice["text"], "é");
    assert_eq!(choice["logprobs"]["tokens"], json!(["bytes:\\xc3", "bytes:\\xa9"]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 0]));
}

#[tokio::test]
async fn ids_that_the_tokenizer_does_not_know_have_a_name() {
    let fake = Fake::new(|_| vec![Step::Token(290), Step::Finish(FinishReason::Length)]);
    let choice = fake.ok(PATH, json!({"prompt": "a", "logprobs": 0})).await["choices"][0].clone();
    assert_eq!((&choice["text"], &choice["logprobs"]["tokens"]), (&json!(""), &json!(["token_id:290"])));
}

#[tokio::test]
async fn every_sampling_field_arrives() {
    let fake = Fake::saying("x", FinishReason::Length);
    let body = json!({
        "prompt": "a", "temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5, "presence_penalty": -1,
        "frequency_penalty": 0.5, "logit_bias": {"5": -100, "3": 1.5}, "seed": 42, "max_completion_tokens": 9, "stop_token_ids": [3],
        "ignore_eos": true, "user": "me", "metadata": {"a": 1}, "store": false, "service_tier": "auto", "n": 1, "best_of": 1,
        "suffix": null, "logprobs": 3,
    });
    fake.ok(PATH, body).await;
    let params = fake.asked().await.params;
    let expected = mlx_cluster_common::sampling::SamplingParams {
        temperature: 0.25,
        top_p: 0.5,
        min_p: 0.125,
        top_k: 7,
        repetition_penalty: 1.5,
        presence_penalty: -1.0,
        frequency_penalty: 0.5,
        logit_bias: vec![(3, 1.5), (5, -100.0)],
        seed: 42,
        logprobs: Some(3),
        prompt_logprobs: None,
        max_tokens: 9,
        stop_tokens: vec![3],
    };
    assert_eq!(params, expected);
}

#[tokio::test]
async fn an_answer_gets_no_more_than_the_context_has_left() {
    let fake = Fake::saying("x", FinishReason::Length);
    fake.ok(PATH, json!({"prompt": "abcde", "max_tokens": 100_000})).await;
    assert_eq!(fake.asked().await.params.max_tokens, CONTEXT - 5);
}
