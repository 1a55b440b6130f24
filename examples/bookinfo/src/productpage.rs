//! The page of a book: `GET /productpage` for people, `/api/v1/products…` for programs.

use std::net::SocketAddr;

use anyhow::Result;
use hyper::body::Incoming;
use hyper::{HeaderMap, Method, Request, StatusCode};
use serde_json::{Value, json};

use crate::server::{self, Answer};
use crate::upstream::Upstream;

const TITLE: &str = "The Comedy of Errors";
const DESCRIPTION: &str = "Two pairs of twins, parted at sea, come to the same town on the same day, and everybody meets the wrong one.";

/// Where the other services answer, each as `http://host:port`.
#[derive(Clone)]
pub(crate) struct Upstreams {
    /// Details.
    pub(crate) details: String,
    /// Reviews.
    pub(crate) reviews: String,
    /// Ratings.
    pub(crate) ratings: String,
}

#[derive(Clone)]
struct Page {
    upstreams: Upstreams,
    client: Upstream,
}

/// Serves until the program is asked to end.
pub(crate) async fn run(listen: SocketAddr, upstreams: Upstreams) -> Result<()> {
    let page = Page { upstreams, client: Upstream::new() };
    server::serve(listen, move |request| {
        let page = page.clone();
        async move { page.answer(&request).await }
    })
    .await
}

impl Page {
    async fn answer(&self, request: &Request<Incoming>) -> Answer {
        if request.method() != Method::GET {
            return server::error(StatusCode::METHOD_NOT_ALLOWED, "only GET is served");
        }
        let headers = request.headers();
        match server::segments(request.uri().path()).as_slice() {
            [] | ["index.html"] => server::html(StatusCode::OK, index()),
            ["health"] => server::healthy("Product page"),
            ["productpage"] => server::html(StatusCode::OK, self.html(headers).await),
            ["api", "v1", "products"] => server::json(StatusCode::OK, &json!([product()])),
            ["api", "v1", "products", id] => self.api(&self.upstreams.details, "details", id, headers).await,
            ["api", "v1", "products", id, "reviews"] => {
                self.api(&self.upstreams.reviews, "reviews", id, headers).await
            }
            ["api", "v1", "products", id, "ratings"] => {
                self.api(&self.upstreams.ratings, "ratings", id, headers).await
            }
            _ => server::error(StatusCode::NOT_FOUND, "no such page"),
        }
    }

    async fn api(&self, base: &str, what: &str, id: &str, headers: &HeaderMap) -> Answer {
        let Ok(id) = id.parse::<u32>() else {
            return server::error(StatusCode::BAD_REQUEST, "please provide numeric product id");
        };
        match self.client.get_json(&format!("{base}/{what}/{id}"), headers).await {
            Ok(answer) => server::json(StatusCode::OK, &answer),
            Err(error) => {
                eprintln!("{what}: {error:#}");
                let sorry = format!("Sorry, product {what} are currently unavailable for this book.");
                server::error(StatusCode::SERVICE_UNAVAILABLE, &sorry)
            }
        }
    }

    async fn html(&self, headers: &HeaderMap) -> String {
        let details = format!("{}/details/0", self.upstreams.details);
        let reviews = format!("{}/reviews/0", self.upstreams.reviews);
        let details = self.client.get_json(&details, headers);
        let reviews = self.client.get_json(&reviews, headers);
        let (details, reviews) = both(details, reviews).await;
        let details = details.map_or_else(|error| sorry("details", &error), |d| details_html(&d));
        let reviews = reviews.map_or_else(|error| sorry("reviews", &error), |r| reviews_html(&r));
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Simple Bookstore App</title>\
             <style>body{{font:16px/1.5 sans-serif;max-width:50em;margin:2em auto;padding:0 1em}}\
             .stars-red{{color:#c00}} .error{{color:#a00}} dt{{font-weight:bold}}</style></head>\n\
             <body><h1>{TITLE}</h1><p>{DESCRIPTION}</p>\n<h2>Book Details</h2>\n{details}\n\
             <h2>Book Reviews</h2>\n{reviews}\n</body></html>\n"
        )
    }
}

/// Both answers, asked for at the same time.
async fn both<A: Future, B: Future>(a: A, b: B) -> (A::Output, B::Output) {
    tokio::join!(a, b)
}

fn sorry(what: &str, error: &anyhow::Error) -> String {
    eprintln!("{what}: {error:#}");
    format!(
        "<p class=\"error\">Error fetching product {what}!</p>\n\
         <p>Sorry, product {what} are currently unavailable for this book.</p>"
    )
}

fn product() -> Value {
    json!({"id": 0, "title": TITLE, "descriptionHtml": DESCRIPTION})
}

fn index() -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Simple Bookstore App</title></head>\n\
         <body><h1>Bookinfo</h1><p><a href=\"/productpage\">{TITLE}</a></p></body></html>\n"
    )
}

fn details_html(details: &Value) -> String {
    let rows = ["type", "pages", "publisher", "language", "ISBN-10", "ISBN-13"];
    let rows: String =
        rows.iter().map(|name| format!("<dt>{name}</dt><dd>{}</dd>", text(&details[*name]))).collect();
    format!("<dl>{rows}</dl>")
}

fn reviews_html(answer: &Value) -> String {
    let reviews = answer["reviews"].as_array().map(Vec::as_slice).unwrap_or_default();
    let shown: String = reviews.iter().map(review_html).collect();
    format!("{shown}<p>Reviews served by: <u>{}</u></p>", text(&answer["podname"]))
}

fn review_html(review: &Value) -> String {
    let rating = &review["rating"];
    let stars = match rating["stars"].as_u64() {
        Some(stars) => {
            let full = usize::try_from(stars.min(5)).unwrap_or(5);
            let color = if rating["color"] == "red" { "red" } else { "black" };
            format!("<p class=\"stars-{color}\">{}{}</p>", "★".repeat(full), "☆".repeat(5 - full))
        }
        None => rating
            .get("error")
            .map(|error| format!("<p class=\"error\">{}</p>", text(error)))
            .unwrap_or_default(),
    };
    format!(
        "<blockquote><p>{}</p><small>{}</small>{stars}</blockquote>\n",
        text(&review["text"]),
        text(&review["reviewer"])
    )
}

/// A JSON value as text that HTML can hold.
fn text(value: &Value) -> String {
    let plain = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    plain.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_service_answers_cannot_become_markup() {
        let page =
            reviews_html(&json!({"podname": "<b>", "reviews": [{"text": "<script>", "reviewer": "a&b"}]}));
        assert!(page.contains("&lt;script&gt;") && page.contains("a&amp;b") && page.contains("&lt;b&gt;"));
        assert!(!page.contains("<script>"));
    }

    #[test]
    fn more_than_five_stars_are_shown_as_five() {
        let page =
            review_html(&json!({"text": "t", "reviewer": "r", "rating": {"stars": 99, "color": "red"}}));
        assert_eq!(page.matches('★').count(), 5);
        assert!(page.contains("stars-red"));
    }
}
