//! Who belongs to a cluster: names, duplicates, joining without multicast.

use crate::support::{Cluster, TinyModel, free_port};

#[test]
fn a_second_coordinator_for_a_cluster_name_is_refused_and_the_first_serves_on() {
    let model = TinyModel::new();
    let cluster = Cluster::serving(model.path(), 1);
    let http = format!("127.0.0.1:{}", free_port());
    let second = cluster.run(&["coordinator", "--cluster", &cluster.name, "--http", &http, "--model", &model.text(), "--wait", "20"]);
    second.expect_refusal(4, &["coordinator", &cluster.name]);
    assert_eq!(cluster.complete(3).status, 200);
}

#[test]
fn clusters_of_different_names_do_not_see_each_other() {
    let model = TinyModel::new();
    let (one, other) = (Cluster::serving(model.path(), 1), Cluster::serving(model.path(), 1));
    for cluster in [&one, &other] {
        assert_eq!(cluster.get("/v1/cluster").body["workers"].as_array().map(Vec::len), Some(1));
        assert_eq!(cluster.complete(3).status, 200);
    }
}
