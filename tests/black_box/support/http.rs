//! A plain HTTP client for tests: answers with their status, and streams event by event.

use serde_json::Value;
use std::{
    io::{BufRead, BufReader},
    time::Duration,
};

const TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Value,
}

impl Answer {
    /// The text of the first choice.
    pub(crate) fn text(&self) -> &str {
        let choice = &self.body["choices"][0];
        let text = choice["message"]["content"].as_str().or_else(|| choice["text"].as_str());
        text.unwrap_or_else(|| panic!("no text in {self:?}"))
    }

    pub(crate) fn error(&self) -> &str {
        self.body["error"]["message"].as_str().unwrap_or_else(|| panic!("no error in {self:?}"))
    }
}

/// None when nobody answers.
pub(crate) fn get(url: &str) -> Option<Answer> {
    client().get(url).send().ok().map(answer)
}

pub(crate) fn post(url: &str, body: &Value) -> Answer {
    answer(client().post(url).json(body).send().unwrap())
}

fn answer(response: reqwest::blocking::Response) -> Answer {
    let status = response.status().as_u16();
    let text = response.text().unwrap();
    Answer { status, body: serde_json::from_str(&text).unwrap_or(Value::String(text)) }
}

fn client() -> reqwest::blocking::Client {
    reqwest::blocking::Client::builder().timeout(TIMEOUT).no_proxy().build().unwrap()
}

/// The events of a streamed answer.
pub(crate) struct Stream {
    lines: std::io::Lines<BufReader<reqwest::blocking::Response>>,
}

impl Stream {
    pub(crate) fn open(url: &str, body: &Value) -> Self {
        let response = client().post(url).json(body).send().unwrap();
        assert_eq!(response.status().as_u16(), 200, "{}", response.text().unwrap());
        Self { lines: BufReader::new(response).lines() }
    }
}

impl Iterator for Stream {
    type Item = Value;

    /// The next event; None after `[DONE]`, or where the connection ends.
    fn next(&mut self) -> Option<Value> {
        loop {
            let line = self.lines.next()?.ok()?;
            match line.strip_prefix("data: ") {
                Some("[DONE]") => return None,
                Some(data) => return Some(serde_json::from_str(data).unwrap()),
                None => {}
            }
        }
    }
}
