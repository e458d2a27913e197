//! Jobs as text for people.

use serde_json::Value;

/// One line a job.
pub(super) fn list(jobs: &Value) -> String {
    let jobs = jobs["data"].as_array().map(Vec::as_slice).unwrap_or_default();
    if jobs.is_empty() {
        return "no jobs yet; start one with `mlx-cluster train`\n".into();
    }
    let mut text = format!("{:16} {:9} {:>15}  {}\n", "job", "state", "iteration", "model");
    for job in jobs {
        let of = format!("{} of {}", plain(&job["iteration"]), plain(&job["iterations"]));
        text += &format!("{:16} {:9} {of:>15}  {}\n", plain(&job["id"]), plain(&job["state"]), plain(&job["model"]));
    }
    text
}

/// Everything about one job.
pub(super) fn job(job: &Value) -> String {
    let cause = job["cause"].as_str().map(|cause| format!(" ({cause})")).unwrap_or_default();
    let mut text = format!("job {}: {}{cause}\n", plain(&job["id"]), plain(&job["state"]));
    text += &format!("iteration {} of {}\n", plain(&job["iteration"]), plain(&job["iterations"]));
    text += &format!("model {}\nadapter {}\nstrategy {}\n", plain(&job["model"]), plain(&job["adapter_path"]), plain(&job["strategy"]));
    if let Some(plan) = job["plan"].as_str() {
        text += plan.trim_end();
        text.push('\n');
    }
    text
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn jobs_are_told_a_line_each() {
        assert!(list(&json!({"data": []})).contains("mlx-cluster train"));
        let one = json!({"id": "20260314-1a2b3c", "state": "failed", "cause": "NaN", "iteration": 7, "iterations": 100, "model": "a/b",
            "adapter_path": "/x", "strategy": "data", "plan": "two replicas\n"});
        let text = list(&json!({"data": [one]}));
        assert!(
            text.lines().nth(1).is_some_and(|line| ["20260314-1a2b3c", "failed", "7 of 100", "a/b"].iter().all(|part| line.contains(part))),
            "{text}"
        );
        assert_eq!(
            job(&one),
            "job 20260314-1a2b3c: failed (NaN)\niteration 7 of 100\nmodel a/b\nadapter /x\nstrategy data\ntwo replicas\n"
        );
    }
}
