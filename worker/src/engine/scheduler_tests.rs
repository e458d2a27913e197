//! The scheduler against a pretend pipeline: whatever the order of results, every sequence is served once and whole.

use super::*;
use mlx_cluster_common::{request::TokenOut, sampling::SamplingParams, step::SegmentResult};
use std::collections::BTreeSet;

fn limits(n_stages: u32) -> Limits {
    Limits {
        n_stages,
        context_tokens: 1000,
        cache_tokens: 4000,
        reservation: CacheReservation::default(),
        sequences: 64,
        prefill_tokens: 64,
        scored_tokens: 16,
        part_multiple: 1,
    }
}

fn submission(sequence: u64, prompt: u32, max_tokens: u32) -> Submission {
    let params = SamplingParams { max_tokens, stop_tokens: vec![7], ..Default::default() };
    Submission { sequence: SequenceId(sequence), prompt: (0..prompt).map(|i| 100 + i).collect(), params, adapter: None }
}

#[test]
fn an_adapter_is_in_use_until_the_last_step_with_it_is_back() {
    let (one, other) = (AdapterId(1), AdapterId(2));
    let mut scheduler = BatchScheduler::new(limits(1));
    scheduler.reset(Epoch(1));
    assert_eq!(scheduler.submit(Submission { adapter: Some(one), ..submission(1, 10, 5) }), None);
    assert!(scheduler.uses(one) && !scheduler.uses(other), "it waits");
    let step = scheduler.next_step().expect("a step");
    assert_eq!(step.admissions.iter().map(|admission| admission.adapter).collect::<Vec<_>>(), [Some(one)]);
    scheduler.cancel(SequenceId(1));
    assert!(scheduler.uses(one), "its step is under way");
    scheduler.on_result(answer(&step, u32::MAX));
    assert!(!scheduler.uses(one));
}

/// What the last stage answers: token `1000 + index` for each draw, or the stop token where `stop_at` says so.
fn answer(step: &Step, stop_at: u32) -> StepResult {
    let token = |index: u32| TokenOut { id: if index == stop_at { 7 } else { 1000 + index }, logprob: None, top: Vec::new() };
    let entry = |segment: &Segment| SegmentResult { sequence: segment.sequence, sampled: segment.output.sample.map(token), prompt: None };
    StepResult { epoch: step.epoch, number: step.number, sequences: step.segments.iter().map(entry).collect() }
}

/// Checks the rules that every stage relies on, as it would apply the steps.
#[derive(Default)]
struct Stage {
    lengths: BTreeMap<SequenceId, u32>,
    last_number: u64,
}

impl Stage {
    fn apply(&mut self, step: &Step) {
        assert_eq!(step.number, self.last_number + 1, "steps are numbered without gaps");
        self.last_number = step.number;
        for sequence in &step.releases {
            assert!(self.lengths.remove(sequence).is_some(), "only what was admitted is released");
        }
        for admission in &step.admissions {
            assert!(self.lengths.insert(admission.sequence, 0).is_none(), "admitted once");
        }
        let mut seen = BTreeSet::new();
        for segment in &step.segments {
            assert!(seen.insert(segment.sequence), "a sequence has one segment in a step");
            let length = self.lengths.get_mut(&segment.sequence).expect("admitted before it is used");
            assert_eq!(*length, segment.start, "positions follow each other");
            *length += segment.tokens.len() as u32;
        }
    }
}

/// Runs to the end with results coming back `delay` steps late; gives each sequence's tokens and reason.
fn run(scheduler: &mut BatchScheduler, delay: usize, stop_at: u32) -> BTreeMap<SequenceId, (Vec<u32>, FinishReason)> {
    let (mut stage, mut queue, mut done) = (Stage::default(), VecDeque::new(), BTreeMap::new());
    let mut tokens: BTreeMap<SequenceId, Vec<u32>> = BTreeMap::new();
    for _ in 0..10_000 {
        let step = scheduler.next_step();
        if let Some(step) = &step {
            stage.apply(step);
            queue.push_back(answer(step, stop_at));
        }
        if queue.len() <= delay && step.is_some() {
            continue;
        }
        let Some(result) = queue.pop_front() else { break };
        for delivery in scheduler.on_result(result) {
            match delivery {
                Delivery::Token { sequence, token } => tokens.entry(sequence).or_default().push(token.id),
                Delivery::Finished { sequence, reason } => {
                    let tokens = tokens.remove(&sequence).unwrap_or_default();
                    assert!(done.insert(sequence, (tokens, reason)).is_none(), "finished once");
                }
                other => panic!("unexpected {other:?}"),
            }
        }
    }
    assert!(scheduler.is_idle() && stage.lengths.is_empty(), "nothing is left behind");
    assert_eq!(scheduler.load(), EngineLoad { cache_tokens_max: 4000, ..Default::default() });
    done
}

#[test]
fn every_sequence_gets_its_tokens_whatever_the_number_of_stages() {
    for n_stages in 1..=4 {
        for delay in 0..=n_stages as usize {
            let mut scheduler = BatchScheduler::new(limits(n_stages));
            for sequence in 0..40 {
                assert_eq!(scheduler.submit(submission(sequence, 1 + (sequence as u32 * 37) % 200, (sequence as u32 * 5) % 23)), None);
            }
            let done = run(&mut scheduler, delay, u32::MAX);
            assert_eq!(done.len(), 40);
            for (sequence, (tokens, reason)) in done {
                let expected: Vec<u32> = (0..(sequence.0 as u32 * 5) % 23).map(|index| 1000 + index).collect();
                assert_eq!((tokens, reason), (expected, FinishReason::Length), "{sequence} with {n_stages} stages, delay {delay}");
            }
        }
    }
}

#[test]
fn a_stop_token_ends_a_sequence_also_when_the_next_step_is_under_way() {
    for n_stages in 1..=3 {
        let mut scheduler = BatchScheduler::new(limits(n_stages));
        (0..5).for_each(|sequence| assert_eq!(scheduler.submit(submission(sequence, 10, 50)), None));
        for (tokens, reason) in run(&mut scheduler, n_stages as usize, 3).into_values() {
            assert_eq!((tokens, reason), (vec![1000, 1001, 1002, 7], FinishReason::Stop));
        }
    }
}

#[test]
fn one_stage_schedules_on_tokens_that_are_not_known_yet_and_more_stages_do_not() {
    let previous = |n_stages| {
        let mut scheduler = BatchScheduler::new(limits(n_stages));
        scheduler.submit(submission(1, 5, 10));
        scheduler.next_step().expect("prefill");
        scheduler.next_step().map(|step| step.segments[0].tokens.clone())
    };
    assert_eq!(previous(1), Some(vec![Token::Previous]));
    assert_eq!(previous(2), None);
}

#[test]
fn stages_work_at_the_same_time_on_different_groups() {
    let mut scheduler = BatchScheduler::new(limits(2));
    (0..6).for_each(|sequence| assert_eq!(scheduler.submit(submission(sequence, 8, 20)), None));
    let prefill = scheduler.next_step().expect("prefill");
    assert_eq!(prefill.segments.len(), 6, "short prompts share a step");
    scheduler.on_result(answer(&prefill, u32::MAX));
    let (first, second) = (scheduler.next_step().expect("a group"), scheduler.next_step().expect("the other group"));
    let members = |step: &Step| step.segments.iter().map(|segment| segment.sequence).collect::<BTreeSet<_>>();
    assert_eq!((members(&first).len(), members(&second).len()), (3, 3));
    assert!(members(&first).is_disjoint(&members(&second)));
    assert_eq!(scheduler.next_step(), None, "a group waits for its own result");
}

#[test]
fn a_long_prompt_takes_turns_with_running_sequences_and_short_prompts() {
    let mut scheduler = BatchScheduler::new(limits(1));
    scheduler.submit(submission(1, 4, 500));
    let first = scheduler.next_step().expect("prefill");
    scheduler.on_result(answer(&first, u32::MAX));
    scheduler.submit(submission(2, 900, 5));
    scheduler.submit(submission(3, 10, 5));
    let mut decodes = 0;
    let mut short_read_after = None;
    for turn in 0..20 {
        let step = scheduler.next_step().expect("work");
        let parts: Vec<_> = step.segments.iter().map(|segment| (segment.sequence.0, segment.tokens.len())).collect();
        decodes += usize::from(parts.contains(&(1, 1)));
        if parts.contains(&(3, 10)) {
            short_read_after.get_or_insert(turn);
        }
        assert!(step.tokens() <= 64);
        scheduler.on_result(answer(&step, u32::MAX));
    }
    assert!(decodes >= 9, "every other step is a decode step, not {decodes} of 20");
    assert!(short_read_after.expect("read") <= 2);
}

#[test]
fn a_sequence_reserves_what_the_caches_hold_of_it() {
    let reservation = CacheReservation { held_max: 400, ..CacheReservation::default() };
    let mut scheduler = BatchScheduler::new(Limits { reservation, ..limits(1) });
    for sequence in 0..11 {
        assert_eq!(scheduler.submit(submission(sequence, 500, 400)), None);
    }
    assert!(scheduler.has_step());
    assert_eq!((scheduler.load().cache_tokens_used, scheduler.load().waiting), (4000, 1));
    run(&mut scheduler, 0, 9999);
    assert_eq!(scheduler.load().cache_tokens_used, 0);
}

#[test]
fn caches_are_reserved_before_a_sequence_starts() {
    let mut scheduler = BatchScheduler::new(limits(1));
    (0..10).for_each(|sequence| assert_eq!(scheduler.submit(submission(sequence, 100, 900)), None));
    scheduler.next_step().expect("prefill");
    assert_eq!((scheduler.load().running, scheduler.load().waiting), (4, 6));
}

#[test]
fn a_cancelled_sequence_is_released_and_delivers_nothing_more() {
    let mut scheduler = BatchScheduler::new(limits(1));
    scheduler.submit(submission(1, 5, 10));
    let prefill = scheduler.next_step().expect("prefill");
    let decode = scheduler.next_step().expect("decode");
    scheduler.cancel(SequenceId(1));
    assert_eq!(scheduler.on_result(answer(&prefill, u32::MAX)), []);
    assert_eq!(scheduler.on_result(answer(&decode, u32::MAX)), []);
    let release = scheduler.next_step().expect("a step that only releases");
    assert_eq!((release.releases, release.segments.len()), (vec![SequenceId(1)], 0));
}

#[test]
fn what_cannot_be_served_is_refused_at_once() {
    let mut scheduler = BatchScheduler::new(limits(1));
    for (prompt, max_tokens) in [(0, 5), (1001, 0), (1000, 1)] {
        assert!(matches!(scheduler.submit(submission(1, prompt, max_tokens)), Some(Delivery::Refused { .. })), "{prompt} {max_tokens}");
    }
    assert_eq!(scheduler.submit(submission(1, 1000, 0)), None);
    assert!(matches!(scheduler.submit(submission(1, 5, 5)), Some(Delivery::Refused { .. })), "a number is used once");
}

#[test]
fn results_of_an_earlier_epoch_are_ignored() {
    let mut scheduler = BatchScheduler::new(limits(1));
    scheduler.submit(submission(1, 5, 10));
    let step = scheduler.next_step().expect("prefill");
    scheduler.reset(Epoch(2));
    scheduler.submit(submission(1, 5, 10));
    scheduler.next_step().expect("prefill");
    assert_eq!(scheduler.on_result(answer(&step, u32::MAX)), []);
    assert_eq!(scheduler.under_way(), 1, "the new epoch's step of the same number still counts");
}

#[test]
fn parts_follow_the_pace_only_while_others_are_there() {
    let mut scheduler = BatchScheduler::new(limits(1));
    scheduler.pace(20);
    scheduler.submit(submission(1, 200, 5));
    assert_eq!(scheduler.next_step().expect("prefill").tokens(), 64);
    scheduler.submit(submission(2, 200, 5));
    assert_eq!(scheduler.next_step().expect("prefill").tokens(), 20);
}

#[test]
fn a_lone_prompt_goes_through_a_pipeline_in_parts_that_keep_all_stages_busy() {
    let wide = |n_stages| Limits { prefill_tokens: 512, ..limits(n_stages) };
    for (n_stages, part) in [(1, 512), (2, 125), (3, 83), (8, 64)] {
        let mut scheduler = BatchScheduler::new(wide(n_stages));
        scheduler.submit(submission(1, 1000, 0));
        assert_eq!(scheduler.next_step().expect("prefill").tokens(), part, "{n_stages} stages");
    }
}

#[test]
fn parts_end_at_multiples_and_no_token_is_left_alone() {
    for (prompt, most) in (1..400).flat_map(|prompt| [1, 50, 64, 100, 128, 512].map(|most| (prompt, most))) {
        let mut read = 0;
        while read < prompt {
            let length = part_length(read, prompt, most, 64);
            assert!(length > 0 && (length <= most.max(65)), "{length} of {prompt} at {read}, about {most}");
            assert!(length > 1 || prompt == 1, "a single token of {prompt}");
            read += length;
            assert!(read == prompt || read % 64 == 0);
        }
        assert_eq!(read, prompt);
    }
    assert_eq!(part_length(3, 100, 10, 1), 10);
}

#[test]
fn prompts_are_read_in_multiples_whatever_the_pace() {
    let limits = Limits { prefill_tokens: 512, part_multiple: 64, ..limits(1) };
    let mut scheduler = BatchScheduler::new(limits);
    scheduler.pace(30);
    assert_eq!(scheduler.submit(submission(1, 200, 3)), None);
    assert_eq!(scheduler.submit(submission(2, 150, 3)), None);
    let mut read: BTreeMap<SequenceId, u32> = BTreeMap::new();
    while let Some(step) = scheduler.next_step() {
        for segment in step.segments.iter().filter(|segment| segment.tokens.len() > 1) {
            assert_eq!(segment.start % 64, 0);
            *read.entry(segment.sequence).or_default() += segment.tokens.len() as u32;
        }
        scheduler.on_result(answer(&step, 99));
    }
    assert_eq!(read.into_values().collect::<Vec<_>>(), [200, 150]);
}

#[test]
fn no_more_sequences_work_than_the_plan_has_room_for() {
    let mut scheduler = BatchScheduler::new(Limits { sequences: 2, ..limits(1) });
    for sequence in 1..=3 {
        assert_eq!(scheduler.submit(submission(sequence, 4, 4)), None);
    }
    scheduler.next_step().expect("work is there");
    assert_eq!((scheduler.load().running, scheduler.load().waiting), (2, 1));
}
