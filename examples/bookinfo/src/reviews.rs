//! `GET /reviews/ID`: what readers say; v2 and v3 add the stars that ratings knows.

use std::net::SocketAddr;

use anyhow::Result;
use hyper::body::Incoming;
use hyper::{HeaderMap, Method, Request, StatusCode};
use serde_json::{Value, json};

use crate::server::{self, Answer};
use crate::upstream::Upstream;

/// Which of the three reviews this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Version {
    /// No stars.
    V1,
    /// Black stars.
    V2,
    /// Red stars.
    V3,
}

impl Version {
    fn color(self) -> Option<&'static str> {
        match self {
            Version::V1 => None,
            Version::V2 => Some("black"),
            Version::V3 => Some("red"),
        }
    }
}

#[derive(Clone)]
struct Reviews {
    version: Version,
    ratings: String,
    upstream: Upstream,
    pod: String,
}

/// Serves until the program is asked to end.
pub(crate) async fn run(listen: SocketAddr, version: Version, ratings: String) -> Result<()> {
    let pod = std::env::var("POD_NAME").or_else(|_| std::env::var("HOSTNAME")).unwrap_or_default();
    let reviews = Reviews { version, ratings, upstream: Upstream::new(), pod };
    server::serve(listen, move |request| {
        let reviews = reviews.clone();
        async move { reviews.answer(&request).await }
    })
    .await
}

impl Reviews {
    async fn answer(&self, request: &Request<Incoming>) -> Answer {
        match (request.method(), server::segments(request.uri().path()).as_slice()) {
            (&Method::GET, ["health"]) => server::healthy("Reviews"),
            (&Method::GET, ["reviews", id]) => match id.parse() {
                Ok(id) => server::json(StatusCode::OK, &self.reviews(id, request.headers()).await),
                Err(_) => server::error(StatusCode::BAD_REQUEST, "please provide numeric product id"),
            },
            _ => server::error(StatusCode::NOT_FOUND, "no such page"),
        }
    }

    async fn reviews(&self, id: u32, headers: &HeaderMap) -> Value {
        let ratings = match self.version.color() {
            None => None,
            Some(color) => Some((color, self.ratings(id, headers).await)),
        };
        let review = |reviewer: &str, text: &str| {
            let mut review = json!({"reviewer": reviewer, "text": text});
            match &ratings {
                None => {}
                Some((color, Some(stars))) => {
                    review["rating"] = json!({"stars": stars[reviewer], "color": color});
                }
                Some((_, None)) => {
                    review["rating"] = json!({"error": "Ratings service is currently unavailable"});
                }
            }
            review
        };
        json!({
            "id": id.to_string(),
            "podname": self.pod,
            "clustername": "null",
            "reviews": [
                review("Reviewer1", "Two sets of twins, one town, and nobody asks the obvious question: great fun."),
                review("Reviewer2", "Light, quick and loud. The later comedies have more to them."),
            ],
        })
    }

    /// The stars by reviewer, or none when ratings can't be had.
    async fn ratings(&self, id: u32, headers: &HeaderMap) -> Option<Value> {
        let url = format!("{}/ratings/{id}", self.ratings);
        match self.upstream.get_json(&url, headers).await {
            Ok(mut answer) => answer.get_mut("ratings").map(Value::take),
            Err(error) => {
                eprintln!("ratings: {error:#}");
                None
            }
        }
    }
}
